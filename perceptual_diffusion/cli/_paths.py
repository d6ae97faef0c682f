"""Names and files that come from anywhere: looked at before they are used."""

import errno
import os
import stat
from pathlib import Path

from perceptual_diffusion.cli._errors import UserError

LARGEST = 2**24
"""Bytes of a config, an index or a record: real ones have some thousands."""


def path(name: str | Path, what: str) -> Path:
    """Give the path of a name, `~` replaced.

    Args:
        name: as it was typed, or read from a file.
        what: what it is called in the message.

    Raises:
        UserError: no file can have this name, or it may not be looked at.
    """
    try:
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


def text(file: Path) -> str:
    """Read a text file whole.

    Raises:
        OSError: it cannot be read, is no regular file, or is too large.
        UnicodeDecodeError: it is not UTF-8.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, and a device has no end
        folder = stat.S_ISDIR(status.st_mode)
        raise OSError(errno.EISDIR if folder else errno.EINVAL, "Is a directory" if folder else "no regular file")
    if status.st_size > LARGEST:
        raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, and at most {LARGEST} are read")
    return file.read_text("utf-8")
