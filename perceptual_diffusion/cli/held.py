"""Keep a folder for one run, and say what to do when the disk fails a run."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from perceptual_diffusion.cli._errors import UserError
from perceptual_diffusion.cli.files import make

FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
"""Neither waits for a pipe's other end nor follows a link."""


@contextmanager
def hold(folder: Path, check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Keep other runs out of a folder while the block runs; the system lets go of it when the process ends, also by a kill.

    The lock is a file beside the folder, which need not be there and may be renamed or replaced meanwhile. A process does
    not keep out itself: of two holds in one process the first that ends frees the folder.

    Args:
        folder: what is held.
        check: refuses the folder; called before anything is written and once more when it is held, as another run may have
            begun or ended meanwhile.

    Raises:
        UserError: another run holds it, or nothing can be written there.
    """
    place = Path(os.path.realpath(folder))
    path = place.parent / f".{place.name}.lock"
    file, made = None, list[Path]()
    try:
        try:
            check()
            made = [] if path.parent.exists() else make(path.parent)
            file = _lock(path, folder)
            check()
        except OSError as error:
            raise UserError(
                f"the folder {str(folder)[:80]!r} cannot be used: {error.strerror or error}. Give another folder."
            ) from error
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                if _is(file, path):
                    path.unlink()
            os.close(file)
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()  # if nothing was written


def _lock(path: Path, folder: Path) -> int | None:
    """Lock a file for this process alone: one that it forks, such as a reader of pictures, does not hold it.

    Returns:
        what to close; None where there can be no lock, which is said.
    """
    while True:
        file = None
        try:
            file = os.open(str(path), OPEN, 0o666)
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if file is not None:
                os.close(file)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise UserError(
                        f"another run is at work in {str(folder)!r}. Wait until it ends, or give another folder."
                    ) from error
            elif os.path.lexists(path) or not os.access(folder, os.W_OK):
                raise
            print(f"{folder} cannot be locked ({error}): start no second run there.", file=sys.stderr)
            return None
        if _is(file, path):
            return file
        os.close(file)  # of a run that has just ended, and removed it


def _is(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


def disk_error(error: OSError, mark: Path | None = None) -> UserError:
    """Say that a file could not be written or read, and how to go on.

    Args:
        error: what the system said.
        mark: the file by which `--resume` knows the run, if there is one.

    Returns:
        the error to raise.
    """
    mend = "Free some space" if error.errno in FULL else "Mend that"
    then = "use --resume" if mark is not None and mark.exists() else "run it again"
    return UserError(f"a file could not be written or read: {error}. {mend}, then {then}.")
