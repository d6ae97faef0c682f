"""Write files so that a reader never sees half of one: to a temporary name, then renamed. No pickle."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from perceptual_diffusion.cli._errors import UserError


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file, which takes the place of `path` if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all."""
    with _replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder whole or not at all: `fill` writes into a temporary one, which then takes the place of `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        if path.exists():
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_state(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Save tensors and a JSON-able description as one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _replacing(path) as temporary:
        save_file(flat, temporary, {"state": json.dumps(meta)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load what `save_state` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["state"])
            if not isinstance(meta, dict):
                raise ValueError("its description is no object")
            return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"the saved state {str(path)!r} cannot be read: {error}. Delete its folder and start again."
        ) from error
