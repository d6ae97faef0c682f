"""The results: rows of one metric each, in one file that several processes may add to."""

import fcntl
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perceptual_diffusion.cli.files import write

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results.json"

KEY = (
    "table", "dataset", "base", "base_steps", "model", "loss", "guidance", "rescale", "nfe", "seed", "n", "metric", "layers",
    "t_prime", "distance", "formulation", "mse_weight", "weight", "teacher", "lr", "steps",
)  # fmt: skip
"""What a row is of. A row of the same is replaced."""
COLUMNS = (*KEY, "value", "compute", "command", "commit", "hardware", "date")


def read(path: Path = RESULTS) -> list[Row]:
    """Read the rows there are."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def add(rows: Sequence[Row], path: Path = RESULTS) -> None:
    """Add rows, in the place of those of the same key.

    Raises:
        ValueError: a row has other columns, or a value that is no number.
    """
    for row in rows:
        if set(row) != set(COLUMNS):
            raise ValueError(f"a row has the columns {sorted(row)}, expected {sorted(COLUMNS)}.")
        if not math.isfinite(row["value"]):
            raise ValueError(f"{row['metric']} of {row['loss']} is {row['value']}.")
    with _alone(path):
        new = {_key(row): {column: row[column] for column in COLUMNS} for row in rows}
        kept = {_key(row): row for row in read(path)} | new
        ordered = sorted(kept.values(), key=lambda row: [str(row[k]) for k in KEY])
        lines = ",\n".join(json.dumps(row) for row in ordered)
        write(path, f"[\n{lines}\n]\n")


def _key(row: Row) -> tuple[str, ...]:
    return tuple(json.dumps(row[name]) for name in KEY)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
