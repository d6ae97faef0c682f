"""The log of a run: log.jsonl, and TensorBoard's files where that is installed."""

import json
import os
import time
from pathlib import Path
from typing import Any, Self

from perceptual_diffusion.cli import _paths
from perceptual_diffusion.cli.files import write


class Log:
    """Rows of scalars by step. Rows after the step at which a run goes on are dropped.

    Args:
        out: folder of the run.
        done: the step at which it goes on.
        writes: whether this process is the one that writes.
    """

    def __init__(self, out: Path, done: int, writes: bool) -> None:
        self.out, self.done, self.writes = out, done, writes
        self.file: Any = None
        self.board: Any = None

    def __enter__(self) -> Self:
        if self.writes:
            path = self.out / "log.jsonl"
            before = [line for line in _lines(path) if (step := _step(line)) is not None and step <= self.done]
            write(path, "".join(f"{line}\n" for line in before))  # also a half line of a killed run is gone
            self.file = path.open("a", encoding="utf-8")
            self.start = time.monotonic()
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return self
            self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.done + 1)
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()

    def write(self, step: int, row: dict[str, float]) -> None:
        """Add a row; "seconds" is the time since the run started or went on."""
        if self.file is None:
            return
        self.file.write(json.dumps({"step": step, **row, "seconds": round(time.monotonic() - self.start, 3)}) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())  # a state of this step must not be on the disk without its row
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, step)


def _lines(path: Path) -> list[str]:
    return _paths.text(path, _paths.LARGEST_TABLE, errors="replace").splitlines() if path.exists() else []


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        return None
