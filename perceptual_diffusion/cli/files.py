"""Write files so that a reader never sees half of one, also after a kill or a full disk; states of runs. No pickle."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perceptual_diffusion.adapters._accelerate import sync
from perceptual_diffusion.cli import _paths
from perceptual_diffusion.cli._errors import UserError

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a weight."""


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a place to write to, whose content takes that of `path` if the block ends well.

    It lies in a folder of its own, which the next write of `path` removes if this one is killed: safetensors writes
    through a file whose name it makes up.
    """
    make(path.parent)
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


def make(folder: Path) -> list[Path]:
    """Make a folder and those that it is in, and give the new ones, the innermost first."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in made:
        sync(place.parent)
    return made


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
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from error


def save_state(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Save tensors and a JSON-able description as one safetensors file with a digest of both, whole or not at all."""
    from safetensors.torch import save_file

    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    description = json.dumps(meta)
    with _replacing(path) as draft, _full_disk_is_an_os_error():
        save_file(flat, draft, {"state": description, "digest": digest(flat, description)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load what `save_state` wrote. Of a state without a digest, as version 0.1 wrote them, only the sizes are checked.

    Raises:
        UserError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("no regular file")
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        told = header.get("digest")
        if told != digest(tensors, header["state"]) if told else header.keys() != {"state"}:
            raise ValueError("it is damaged: its digest is another one")
        meta = json.loads(header["state"])
        if not isinstance(meta, dict):
            raise ValueError("its description is no object")
        return tensors, meta
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise UserError(
            f"the saved state {str(path)!r} cannot be read: {error}. Delete its folder and start again."
        ) from error


def digest(tensors: dict[str, Tensor], description: str = "") -> str:
    """Give the SHA-256 of tensors, their names, dtypes, shapes and all their bytes, and of a description."""
    found = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        content: Any = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        found.update(content)
    return found.hexdigest()


def check_key(what: str, theirs: Any, key: dict[str, Any]) -> None:
    """Refuse what was saved by another run, or by a version that did not write down enough to tell.

    Args:
        what: what was saved, as the message begins.
        theirs: the key that lies with it.
        key: what this run depends on, by name.

    Raises:
        UserError: the keys differ; the message says in what.
    """
    if theirs == key:
        return
    theirs = theirs if isinstance(theirs, dict) else {}
    if absent := sorted(key.keys() - theirs.keys()):
        raise UserError(
            f"{what} was saved by another version, which did not write down its {', '.join(absent)}: whether it is of this run cannot be told. Start again in another folder."
        )
    changed = ", ".join(sorted(name for name in key if theirs[name] != key[name])) or "set-up"
    raise UserError(f"{what} is of a run with another {changed}. Use the same, or another folder.")


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Give the tensors of a state whose names begin with `name` and a dot, without that."""
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}


def optimizer_tensors(optimizer: Any) -> dict[str, Tensor]:
    """Give the moments of an AdamW, as `load_optimizer` reads them."""
    rows = optimizer.state_dict()["state"].items()
    return {f"optimizer.{index}.{name}": value for index, values in rows for name, value in values.items()}


def load_optimizer(optimizer: Any, tensors: dict[str, Tensor], parameters: Iterable[Tensor]) -> None:
    """Give an AdamW of `parameters` its moments back; a weight that had no gradient has none.

    Raises:
        KeyError: a moment is missing.
        ValueError: there is none, or one is of another shape than its weight.
    """
    layout, state = optimizer.state_dict(), dict[int, dict[str, Tensor]]()
    for index, parameter in enumerate(parameters):
        names = {name: f"optimizer.{index}.{name}" for name in MOMENTS}
        if tensors.keys() & names.values():
            state[index] = {name: tensors[full] for name, full in names.items()}
            step, *moments = state[index].values()
            if step.numel() != 1 or any(moment.shape != parameter.shape for moment in moments):
                raise ValueError("a moment of the optimizer has another shape than its weight")
    if not state:
        raise ValueError("the optimizer has no moments")
    optimizer.load_state_dict({**layout, "state": state})


def claim(folder: Path, about: str) -> None:
    """Write down in a run's folder what the run is of; call it before anything else is written there.

    Raises:
        UserError: the folder's run is of something else.
    """
    path = folder / "run.txt"
    theirs = _paths.text(path, errors="replace").strip() if path.exists() else None
    if theirs is None:
        write(path, about + "\n")
    elif theirs != about:
        raise UserError(
            f"the run in {str(folder)!r} is of {theirs}, and this run of {about}. Use the same, or another folder."
        )
