"""Run every cell of the gradient matrix (tests/matrix.py) and write their table into docs/reliability.md.

Run from the project's root: `python tools/matrix_table.py RESULTS`. RESULTS is a file of lines: cells that are in it are not
run again, so that the command goes on where it was stopped. `--no-run` writes the table alone.
"""

import argparse
import json
import re
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import matrix  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"


def read(path: Path) -> dict[matrix.Cell, str]:
    """The cells that were run."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {matrix.Cell(*told["cell"]): told["said"] for told in map(json.loads, lines)}


def say(found: dict) -> str:
    """What became of a cell, in words."""
    if found["what"] == "equal":
        return f"equal, {found['apart']:.0e}"
    why = " ".join(found["why"].split())
    return f"{found['what']}: {why if found['what'] == 'refused' else why[-300:]}"


def run(path: Path) -> None:
    """Run what is left, the quick cells first, and note each at once."""
    done, able = read(path), find_spec("deepspeed") is not None
    left = [c for c in (*matrix.MAIN, *matrix.FURTHER) if c not in done and (able or "ZeRO" not in c.launcher)]
    left.sort(key=lambda cell: cell.compile != "off")
    with path.open("a", encoding="utf-8") as out, tempfile.TemporaryDirectory() as folder:
        for (_, *cell), found in matrix.run([("cell", *cell) for cell in left], Path(folder)):
            out.write(json.dumps({"cell": cell, "said": say(found)}) + "\n")
            out.flush()
            print(" | ".join(cell), "|", say(found)[:200], flush=True)


def table(done: dict[matrix.Cell, str]) -> str:
    """The section: a row for each launcher, teacher, compilation and precision, a column for each checkpointing."""
    notes: dict[str, int] = {}

    def short(cell: matrix.Cell) -> str:
        said = done.get(cell, "not run")
        what, _, why = re.sub(r"'[\w.]+' of `model`", "a weight of `model`", said).partition(": ")
        return said if not why else f"{what} [{notes.setdefault(why, len(notes) + 1)}]"

    def row(*cells: str) -> str:
        return "| " + " | ".join(cells) + " |"

    rows = [row("run by", "compile", "precision", "teacher", *matrix.CHECKPOINTING), row(*["---"] * 7)]
    for key, cells in groupby(matrix.MAIN, lambda cell: (cell.launcher, cell.compile, cell.precision, cell.teacher)):
        rows.append(row(*key, *map(short, cells)))
    rows += ["", row("run by", "compile", "teacher", "the teacher is", "checkpointing", "result"), row(*["---"] * 6)]
    for cell in matrix.FURTHER:
        sharded = cell.sharding if cell.sharding == "whole" else f"sharded, {cell.sharding}"
        rows.append(row(cell.launcher, cell.compile, cell.teacher, sharded, cell.checkpointing, short(cell)))
    counts = [sum(said.startswith(what) for said in done.values()) for what in ("equal", "refused")]
    total = len(matrix.MAIN) + len(matrix.FURTHER)
    head = (
        f"{total} cells: {counts[0]} equal, {counts[1]} refused, {len(done) - sum(counts)} wrong, {total - len(done)} not run "
        f"(torch {version('torch').partition('+')[0]}, CPUs, gloo)."
    )
    listed = [f"{number}. {why}" for why, number in notes.items()]
    return "\n".join([head, "", *rows, "", "Refused with:" if listed else "", "", *listed]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--no-run", action="store_true")
    given = parser.parse_args()
    if not given.no_run:
        run(given.results)
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split("<!-- matrix -->")[0], text.split("<!-- /matrix -->")[1]
    made = f"<!-- matrix -->\n{table(read(given.results))}\n<!-- /matrix -->"
    PAGE.write_text(before + made + after, encoding="utf-8")


if __name__ == "__main__":
    main()
