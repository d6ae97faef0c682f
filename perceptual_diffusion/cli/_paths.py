"""Names and files that come from anywhere: looked at before they are used."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from perceptual_diffusion.cli._errors import UserError

LARGEST = 2**24
"""Bytes of a config, an index or a record: real ones have some thousands."""
LARGEST_TABLE = 2**30
"""Bytes of a log or of the captions of a folder."""


def path(name: str | Path, what: str) -> Path:
    """Give the path of a name, `~` replaced.

    Args:
        name: as it was typed, or read from a file.
        what: what it is called in the message.

    Raises:
        UserError: no file can have this name, or it may not be looked at.
    """
    try:
        if not str(name):  # as a path it would be the working folder
            raise ValueError("it is empty")
        found = Path(name).expanduser()
        os.lstat(found)
    except (FileNotFoundError, NotADirectoryError):
        return found
    except (OSError, ValueError, RuntimeError) as error:  # too long, NUL or half a surrogate, no such user
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            return found
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{what} is {str(name)[:80]!r}, which cannot be used: {reason}. Give another name.") from error
    return found


def refuse_links(folder: Path, what: str) -> None:
    """Refuse a folder to write to in which something is a link: a name in it would be another place.

    Args:
        folder: may be a link itself, which is the user's own choice of a place.
        what: what it is called in the message.

    Raises:
        UserError: a link is in it.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (found := Path(place, name)).is_symlink():
                raise UserError(f"{what} holds {str(found.relative_to(folder))!r}, a link out of it or within. Remove the link, or give another folder.")  # fmt: skip


def text(file: Path, largest: int = LARGEST, *, encoding: str = "utf-8", errors: str = "strict") -> str:
    """Read a text file whole.

    Args:
        file: where it is.
        largest: how many bytes it may have.
        encoding: its encoding, and what is done about `errors` of it, as `open` takes them.
        errors: see `encoding`.

    Raises:
        OSError: it cannot be read, is no regular file, or is too large.
        UnicodeDecodeError: it is not in this encoding.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, and a device has no end
        folder = stat.S_ISDIR(status.st_mode)
        raise OSError(errno.EISDIR if folder else errno.EINVAL, "Is a directory" if folder else "no regular file")
    if status.st_size > largest:
        raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, and at most {largest} are read")
    return file.read_text(encoding, errors)


def mark(file: Path, made_by: str) -> dict[str, Any] | None:
    """Give what one of this package's own JSON files says.

    Args:
        file: where it is.
        made_by: the command that writes it.

    Returns:
        the object in it; None if it is missing, damaged or another program's.
    """
    try:
        facts = json.loads(text(file))
    except (OSError, ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) and facts.get("made by") == made_by else None
