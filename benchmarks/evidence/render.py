"""Make the tables and the figure of `docs/evidence.md` from `benchmarks/evidence/results.json`: `python benchmarks/evidence/render.py`."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import _rows
from _data import SEARCH
from _plan import LONGER_MSE, NEAR, NEARER, SEARCHED, SEEDS, STEPS, TABLES, UNET
from _rows import Row
from matplotlib.figure import Figure
from scipy import stats

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/evidence.md"
PICTURE = ROOT / "docs/images/evidence_recipes.png"
COUNTED = ROOT / "benchmarks/results/step_cost.json"
BATCH, FORWARD, SAMPLES = 64, 1 / 3, 10_000
"""Of fine-tuning; what a pass costs of a training step; where the plan leaves the number of samples to the base."""
H100 = 0.4 * 989.4e12
"""FLOPs a second: four tenths of the dense bfloat16 peak that NVIDIA's data sheet gives for the SXM module."""
OF = tuple(name for name in _rows.KEY if name not in ("table", "seed", "metric"))
RIVALS = ("recommended", NEAR, NEARER)
JUDGED = ("FD", "KID", "precision", "recall")
EQUAL = ("mse-equal-compute", LONGER_MSE)
ORDER = ("FD", "KID", "precision", "recall", "CS", "class", "nearest")


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation over seeds if there are some."""
    digits = 3 if abs(statistics.mean(values)) < 1 else 2
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(rows: Sequence[Row], number: str) -> str:
    """A table of the paper: a line for each model, recipe and way to sample, with all metrics."""
    rows = [row for row in rows if row["table"] == number]
    metrics = sorted({row["metric"] for row in rows}, key=lambda name: (ORDER.index(name.split("-")[0]), name))
    head = ["base", "recipe", "guidance", "passes", "steps", "seeds", "N", *metrics, "training TFLOPs"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for of in sorted({tuple(row[k] for k in OF) for row in rows}, key=str):
        mine = [row for row in rows if tuple(row[k] for k in OF) == of]
        one = mine[0]
        guidance = f"{one['guidance']}, rescaled {one['rescale']}" if one["rescale"] else one["guidance"]
        base = f"{one['base']}, {one['base_steps']} steps" if one["base_steps"] else one["model"]
        seeds = len({row["seed"] for row in mine})
        cells = [base, one["loss"] or "–", guidance, one["nfe"], one["steps"], seeds, one["n"]]
        for metric in metrics:
            values = [row["value"] for row in mine if row["metric"] == metric]
            cells.append(spread(values) if values else "–")
        cells.append(f"{statistics.mean(row['compute'] for row in mine) / 1e12:.0f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def ratio(rows: Sequence[Row], of: Row, to: Row, metric: str) -> tuple[float, float, float, int] | None:
    """The ratio of a metric of two kinds of rows, seed by seed: geometric mean, and the 95 % interval of Student's t.

    Args:
        rows: all rows.
        of: what the one kind has in its columns.
        to: the other.
        metric: the metric.

    Returns:
        mean, low, high, and how many seeds; None for fewer than two seeds in common, or a value that is not positive, as KID may be.

    Raises:
        ValueError: there are several rows of one seed, so that the kind is not told by its columns.
    """

    def by_seed(wanted: Row) -> dict[int, float]:
        found: dict[int, float] = {}
        for row in rows:
            if row["metric"] == metric and all(row[k] == v for k, v in wanted.items()):
                if found.setdefault(row["seed"], row["value"]) != row["value"]:
                    raise ValueError(f"several rows of seed {row['seed']} and {wanted}. Say which are meant.")
        return found

    one, other = by_seed(of), by_seed(to)
    seeds = sorted(one.keys() & other.keys())
    if len(seeds) < 2 or min(of[seed] for of in (one, other) for seed in seeds) <= 0:
        return None
    logs = [math.log(one[seed] / other[seed]) for seed in seeds]
    half = stats.t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    middle = statistics.mean(logs)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half), len(logs)


def verdict(rows: Sequence[Row]) -> str:
    """Recipes against MSE at the same training compute, without guidance; of each base as it was trained longest."""
    head = ("base", "recipe", "passes", "N", "metric", "seeds", "ratio to MSE", "95 % interval")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    rows = [row for row in rows if row["table"] not in ("error", *SEARCHED) and row["guidance"] == "none"]
    longest = {
        base: max(row["base_steps"] for row in rows if row["base"] == base) for base in {row["base"] for row in rows}
    }
    kinds = {
        (row["base"], RIVALS.index(row["loss"]), row["nfe"], -row["n"], row["metric"])
        for row in rows if row["metric"].startswith(JUDGED) and row["loss"] in RIVALS
    }  # fmt: skip
    for base, rival, passes, n, metric in sorted(
        kinds, key=lambda kind: (*kind[:4], ORDER.index(kind[4].split("-")[0]), kind[4])
    ):
        way = {"base": base, "nfe": passes, "n": -n, "base_steps": longest[base]}
        found = ratio(rows, way | {"loss": RIVALS[rival]}, way | {"loss": "mse-equal-compute"}, metric)
        if found:
            figures = (found[3], f"{found[0]:.3f}", f"{found[1]:.3f} – {found[2]:.3f}")
            cells = (base, RIVALS[rival], passes, f"{-n:,}", metric, *figures)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured yet."


def price(counted: Sequence[Row]) -> str:
    """What tables 1 to 7 would take on published models, from operations counted by `step_cost.py`; hours are worked out, not measured.

    Args:
        counted: its rows: a training step of one sample, "MSE" and "plain autograd", which is the objective.
    """
    plan = {(name, how) for number in "1234567" for base, name, ways in TABLES[number] if base == UNET for how in ways}
    trained = {name for name, _ in plan} - {"base"}
    passes = sum(how.steps * (how.n or SAMPLES) * (2 if how.guidance != 1 else 1) for _, how in plan)
    one = 25 * SAMPLES
    lines = [
        "| model, pixels | training once, PFLOPs | 10,000 samples, PFLOPs | H100 hours for both | H100 hours, tables 1 to 7 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for model in dict.fromkeys((row["model"], row["resolution"]) for row in counted):
        step = {row["variant"]: row["flops"] for row in counted if (row["model"], row["resolution"]) == model}
        training, sampling = step["plain autograd"] * BATCH * STEPS, step["MSE"] * FORWARD
        whole = len(SEEDS) * (len(trained) * training + passes * sampling)
        hours = [f"{flops / H100 / 3600:,.1f}" for flops in (training + one * sampling, whole)]
        cells = [f"{model[0]}, {model[1]}", f"{training / 1e15:.0f}", f"{one * sampling / 1e15:.0f}", *hours]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def counted() -> list[Row]:
    """The rows of `step_cost.py` that `price` needs."""
    rows = json.loads(COUNTED.read_text(encoding="utf-8"))["rows"]
    wanted = {"part": "counted", "batch": 1, "lora": False, "outside": False}
    return [row for row in rows if wanted.items() <= row.items()]


def fill(text: str, rows: Sequence[Row]) -> str:
    """Put the tables between their marks, `<!-- table 1 -->` and `<!-- /table 1 -->`.

    Raises:
        ValueError: there are rows of a table that the text has no place for.
    """
    made = dict.fromkeys(re.findall(r"<!-- (table \w+) -->", text), "Not measured yet.")
    made |= {f"table {number}": table(rows, number) for number in sorted({row["table"] for row in rows})}
    made |= {"verdict": verdict(rows), "price": price(counted())}
    for name, content in made.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the document has no place for {name!r}.")
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text


def against_mse(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """Divide each recipe's Fréchet distance by that of MSE of the nearest compute, of the same seed, N, base and real pictures.

    25 passes, no guidance.

    Returns:
        for each base and what it is compared with, for each recipe, a ratio per seed; those that have none are left out.
    """
    found: dict[str, dict[str, list[float]]] = {}
    plain = [
        row for row in rows
        if row["metric"].startswith("FD") and row["table"] != "error" and (row["guidance"], row["nfe"]) == ("none", 25)
    ]  # fmt: skip
    for base, dataset, n in sorted({(row["base"], row["dataset"], row["n"]) for row in plain}):
        steps = max(row["base_steps"] for row in plain if row["base"] == base)
        kind = (base, dataset, n, steps)
        of = {
            (row["seed"], row["loss"]): row
            for row in plain
            if (row["base"], row["dataset"], row["n"], row["base_steps"]) == kind
        }
        mine: dict[str, list[float]] = {}
        for (seed, loss), row in sorted(of.items()):
            mses = [of[seed, mse] for mse in EQUAL if (seed, mse) in of]
            if mses and loss not in EQUAL:
                nearest = min(mses, key=lambda mse, row=row: abs(mse["compute"] - row["compute"]))
                mine.setdefault(loss, []).append(row["value"] / nearest["value"])
        if mine:
            found[f"{base}, N = {n:,}{SEARCH if dataset.endswith(SEARCH) else ''}"] = mine
    return found


def draw(found: dict[str, dict[str, list[float]]]) -> Figure:
    """Draw a panel per base: recipes from the best to the worst, a dot per seed, left of the line better than MSE."""
    heights = [0.9 + 0.24 * len(recipes) for recipes in found.values()]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (base, recipes) in zip(panels, found.items(), strict=True):
        names = sorted(recipes, key=lambda name: -statistics.mean(map(math.log, recipes[name])))
        for place, name in enumerate(names):
            axes.plot(recipes[name], [place] * len(recipes[name]), "o", color="C0", mfc="none")
            axes.plot(statistics.geometric_mean(recipes[name]), place, "|", color="C0", ms=12, mew=2)
        axes.axvline(1, color="0.6", linewidth=1)
        axes.set_xscale("log")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.7, len(names) - 0.3)
        axes.set_title(base, fontsize=10, loc="left")
        axes.grid(axis="x", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    low, high = panels[-1].get_xlim()
    marks = [
        mark for mark in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 4, 6, 10) if low <= mark <= high
    ]
    panels[-1].set_xticks(marks, [f"{mark:g}" for mark in marks])
    panels[-1].set_xticks([], minor=True)
    panels[-1].set_xlabel("Fréchet distance over that of MSE at equal compute, same seed")
    return figure


def main() -> None:
    """Write the document and the figure."""
    rows = _rows.read()
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8"), rows), encoding="utf-8")
    if found := against_mse(rows):
        draw(found).savefig(PICTURE, dpi=90)


if __name__ == "__main__":
    main()
