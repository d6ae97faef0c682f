"""Write files so that a reader never sees half of one, also after a kill or a full disk; keep a folder for one run. No pickle."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from perceptual_diffusion.adapters._accelerate import sync
from perceptual_diffusion.cli._errors import UserError

LOCK = ".lock"


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a place to write to, whose content takes that of `path` if the block ends well.

    It lies in a folder of its own, which the next write of `path` removes if this one is killed: safetensors writes
    through a file whose name it makes up.
    """
    _make(path.parent)
    draft = path.with_name(f".{path.name}.tmp")
    remove(draft)
    draft.mkdir()
    try:
        yield draft / path.name
        for written in sorted(draft.rglob("*")):
            sync(written)
        os.replace(draft / path.name, path)
        sync(path.parent)
    finally:
        remove(draft, ignore_errors=True)


def write(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all."""
    with _replacing(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder whole or not at all: `fill` writes into a temporary one, which then takes the place of `path`."""
    old = path.with_name(f".{path.name}.old")
    if not path.exists() and old.exists():  # a kill came between the two renames below
        os.replace(old, path)
    try:
        with _replacing(path) as draft:
            draft.mkdir()
            with _full_disk_is_an_os_error():
                fill(draft)
            if path.exists():
                remove(old)
                os.replace(path, old)
    finally:
        if path.exists():
            remove(old, ignore_errors=True)
        elif old.exists():
            os.replace(old, path)


def _make(folder: Path) -> None:
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in made:
        sync(place.parent)


def remove(path: Path, ignore_errors: bool = False) -> None:
    """Remove a file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        with contextlib.suppress(OSError if ignore_errors else FileNotFoundError):
            path.unlink()


@contextmanager
def _full_disk_is_an_os_error() -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:  # how safetensors says that a file could not be written
        raise OSError(str(error)) from error


def save_state(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Save tensors and a JSON-able description as one safetensors file with a digest of both, whole or not at all."""
    from safetensors.torch import save_file

    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    description = json.dumps(meta)
    with _replacing(path) as draft, _full_disk_is_an_os_error():
        save_file(flat, draft, {"state": description, "digest": _digest(flat, description)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load what `save_state` wrote. Of a state without a digest, as version 0.1 wrote them, only the sizes are checked.

    Raises:
        UserError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        digest = header.get("digest")
        if digest != _digest(tensors, header["state"]) if digest else header.keys() != {"state"}:
            raise ValueError("it is damaged: its digest is another one")
        meta = json.loads(header["state"])
        if not isinstance(meta, dict):
            raise ValueError("its description is no object")
        return tensors, meta
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"the saved state {str(path)!r} cannot be read: {error}. Delete its folder and start again."
        ) from error


def _digest(tensors: dict[str, Tensor], description: str) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()


def claim(folder: Path, about: str) -> None:
    """Write down in a run's folder what the run is of; call it before anything else is written there.

    Raises:
        UserError: the folder's run is of something else.
    """
    path = folder / "run.txt"
    theirs = path.read_text("utf-8", errors="replace").strip() if path.exists() else None
    if theirs is None:
        write(path, about + "\n")
    elif theirs != about:
        raise UserError(
            f"the run in {str(folder)!r} is of {theirs}, and this run of {about}. Use the same, or another folder."
        )


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder while the block runs; the system lets go of it when the process ends, also by a kill.

    Raises:
        UserError: another run holds it.
    """
    _make(folder)
    path = folder / LOCK
    file = path.open("a")
    while _locked(file, folder) and not _is(file, path):
        file.close()  # of a run that has just ended, and removed it
        file = path.open("a")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing was written


def _locked(file: IO[str], folder: Path) -> bool:
    """Lock a file for this process alone: one that it forks, such as a reader of pictures, does not hold it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise UserError(
                f"another run is at work in {str(folder)!r}. Wait until it ends, or give another folder."
            ) from error
        print(f"The disk of {folder} has no locks ({error}): start no second run there.", file=sys.stderr)
        return False
    return True


def _is(file: IO[str], path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
