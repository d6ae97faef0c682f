"""Make the tables and the figure of `docs/evidence.md` from `benchmarks/evidence/results.json`: `python benchmarks/evidence/render.py`."""

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import _rows
from _rows import Row

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/evidence.md"
OF = ("model", "loss", "guidance", "rescale", "nfe")
ORDER = ("FD", "KID", "precision", "recall", "CS", "class", "nearest")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t at 97.5 % of samples of this size."""


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation over seeds if there are some."""
    digits = 3 if abs(statistics.mean(values)) < 1 else 2
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(rows: Sequence[Row], number: str) -> str:
    """A table of the paper: a line for each model, recipe and way to sample, with all metrics."""
    rows = [row for row in rows if row["table"] == number]
    metrics = sorted({row["metric"] for row in rows}, key=lambda name: (ORDER.index(name.split("-")[0]), name))
    head = ["model", "recipe", "guidance", "passes", "seeds", "N", *metrics, "training TFLOPs"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for of in sorted({tuple(row[k] for k in OF) for row in rows}, key=str):
        mine = [row for row in rows if tuple(row[k] for k in OF) == of]
        seeds = sorted({row["seed"] for row in mine})
        guidance = of[2] if not of[3] else f"{of[2]}, rescaled {of[3]}"
        cells = [of[0], of[1] or "–", guidance, of[4], len(seeds), ", ".join(sorted({str(row["n"]) for row in mine}))]
        for metric in metrics:
            values = [row["value"] for row in mine if row["metric"] == metric]
            cells.append(spread(values) if values else "–")
        cells.append(f"{statistics.mean(row['compute'] for row in mine) / 1e12:.0f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def ratio(rows: Sequence[Row], of: Row, to: Row, metric: str) -> tuple[float, float, float] | None:
    """The ratio of a metric of two kinds of rows, seed by seed: geometric mean, and the 95 % interval of Student's t.

    Args:
        rows: all rows.
        of: what the one kind has in its columns.
        to: the other.
        metric: the metric.

    Returns:
        mean, low and high; None for fewer than two seeds in common.
    """

    def by_seed(wanted: Row) -> dict[int, float]:
        found = [r for r in rows if r["metric"] == metric and all(r[k] == v for k, v in wanted.items())]
        return {row["seed"]: row["value"] for row in found}

    one, other = by_seed(of), by_seed(to)
    logs = [math.log(one[seed] / other[seed]) for seed in sorted(one.keys() & other.keys())]
    if len(logs) < 2:
        return None
    middle, half = statistics.mean(logs), T_95[len(logs)] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def verdict(rows: Sequence[Row]) -> str:
    """The recommended recipe against MSE at the same training compute, 25 evaluations, no guidance."""
    lines = ["| model | metric | ratio to MSE | 95 % interval |", "| --- | --- | --- | --- |"]
    for model in sorted({row["model"] for row in rows}):
        for metric in sorted(
            {row["metric"] for row in rows if row["model"] == model and row["metric"][:2] in ("FD", "KI")}
        ):
            way = {"model": model, "guidance": "none", "nfe": 25}
            found = ratio(rows, way | {"loss": "recommended"}, way | {"loss": "mse-equal-compute"}, metric)
            if found:
                lines.append(f"| {model} | {metric} | {found[0]:.3f} | {found[1]:.3f} – {found[2]:.3f} |")
    return "\n".join(lines)


def fill(text: str, rows: Sequence[Row]) -> str:
    """Put the tables between their marks, `<!-- table 1 -->` and `<!-- /table 1 -->`.

    Raises:
        ValueError: there are rows of a table that the text has no place for.
    """
    made = {f"table {number}": table(rows, number) for number in sorted({row["table"] for row in rows})}
    made["verdict"] = verdict(rows)
    for name, content in made.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the document has no place for {name!r}.")
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text


def main() -> None:
    """Write the document."""
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8"), _rows.read()), encoding="utf-8")


if __name__ == "__main__":
    main()
