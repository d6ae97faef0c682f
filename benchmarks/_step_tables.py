"""Results of `step_cost.py` as Markdown and as a figure."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

STEPS = ("as printed", "plain autograd", "micro-batches of 1")
"""What the table of all models and the figure show."""


def counted(rows: list[Row]) -> str:
    """All models: the limit, Algorithm 1 as printed, and the objective, at the batch they are compared at."""
    head = ["model, resolution", "MSE step", "limit", *(f"{x}: FLOPs" for x in STEPS)]
    head += [f"{x}: memory" for x in STEPS] + ["weights held"]
    lines = []
    for model in _models(rows):
        of = {r["variant"]: r for r in rows if r["model"] == model and r["batch"] == 8 and not r["lora"]}
        limit = of["MSE"]["limit/mse"]
        cells = [_title(of["MSE"]), f"{of['MSE']['flops'] / 8e12:.2f} T", f"{limit:.3f}"]
        cells += [f"{of[x]['flops/mse']:.3f}" for x in STEPS] + [f"{of[x]['live/mse']:.3f}" for x in STEPS]
        lines.append([*cells, f"{of[STEPS[-1]]['weights_share']:.3f}"])
    return _table(head, lines)


def modes(rows: list[Row]) -> str:
    """One model in every mode: FLOPs against the MSE step and the limit, bytes kept and alive, weights held."""
    rows = [r for r in rows if r["model"] == "SD2.1" and r["batch"] == 8 and not r["outside"]]
    head = ["step", "FLOPs / MSE", "FLOPs / limit", "kept / MSE", "alive / MSE", "weights held / model"]
    return _table(head, [_mode(r) for r in rows if not (r["lora"] and r["variant"] == "MSE")])


def _mode(r: Row) -> list[str]:
    name = f"LoRA: {r['variant']}" if r["lora"] else r["variant"]
    ratios = [f"{r[k]:.3f}" for k in ("flops/mse", "flops/limit", "saved/mse", "live/mse")]
    return [name, *ratios, f"{r['weights_bytes'] / r['model_bytes']:.3f}"]


def small_batches(rows: list[Row]) -> str:
    """Bytes alive at batch 1, where there is nothing to split."""
    names = ("plain autograd", "micro-batches of 1")
    lines = []
    for model in _models(rows):
        of = {r["variant"]: r for r in rows if r["model"] == model and r["batch"] == 1 and not r["lora"]}
        if of:
            lines.append([_title(of["MSE"]), *(f"{of[n]['live/mse']:.3f}" for n in names)])
    return _table(["model, resolution", *names], lines)


def instead(rows: list[Row]) -> str:
    """What a user would take instead: FLOPs and bytes alive against the MSE step."""
    names = list(dict.fromkeys(r["variant"] for r in rows if r["outside"]))
    shown = ["micro-batches of 1", *names]
    lines = []
    for model in _models(rows):
        of = {r["variant"]: r for r in rows if r["model"] == model and r["batch"] == 8 and not r["lora"]}
        cells = (f"{of[n]['flops/mse']:.2f}, {of[n]['live/mse']:.2f}" if n in of else "–" for n in shown)
        lines.append([_title(of["MSE"]), *cells])
    return _table(["model, resolution", "self-perceptual", *names], lines)


def wall(rows: list[Row]) -> str:
    """Small models, run: medians of the ratios to the MSE step of the same round, with quartiles."""
    lines = [
        [_title(r), r["variant"], _number(r.get("flops/mse", "–")), f"{r['wall/mse']:.3f}", f"{low:.3f} – {high:.3f}",
         f"{r['wall/mse'] / r['limit/mse']:.3f}"]
        for r in rows
        if r["variant"] != "MSE"
        for low, high in [r["quartiles"]]
    ]  # fmt: skip
    head = ["model, resolution", "step", "FLOPs / MSE", "time / MSE", "quartiles", "time / time of the limit"]
    return _table(head, lines)


def ideas(rows: list[Row]) -> str:
    """What was tried besides."""
    return _table(
        ["model, resolution", "idea", "what", "without", "with"],
        [[_title(r), r["variant"], r["what"], _number(r["without"]), _number(r["with"])] for r in rows],
    )


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "counted": ("counted", counted),
    "modes": ("counted", modes),
    "small batches": ("counted", small_batches),
    "instead": ("counted", instead),
    "wall": ("wall", wall),
    "ideas": ("ideas", ideas),
}
"""Tables of docs/cost.md by the name between their markers: the part of the results they show, and how."""


def fill(text: str, rows: list[Row]) -> str:
    """Put the tables of the results between the markers of a document."""
    for name, (part, table) in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        shown = table([r for r in rows if r["part"] == part])
        text, found = re.subn(f"(?s){re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}{shown}{end}", text)  # noqa: B023
        if found != 1:
            raise ValueError(f"the document has {found} places for the table {name!r}, expected one.")
    return text


def figure(rows: list[Row], path: Path) -> None:
    """Draw how the ratios to the MSE step grow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in rows if r["part"] == "growth"]
    if not rows:
        return
    axes_names = list(dict.fromkeys(r["axis"] for r in rows))
    colours = dict(zip((*STEPS, "limit"), ("#c44e52", "#4c72b0", "#55a868", "#333333"), strict=True))
    drawn, axes = pyplot.subplots(
        2, len(axes_names), figsize=(11, 6), sharey="row", layout="constrained", squeeze=False
    )
    for column, axis in enumerate(axes_names):
        here = [r for r in rows if r["axis"] == axis]
        for line, key in enumerate(("flops/mse", "live/mse")):
            ax = axes[line][column]
            for name in STEPS:
                points = [(r["at"], r[key]) for r in here if r["variant"] == name]
                ax.plot(*zip(*points, strict=True), "o-", color=colours[name], label=name, lw=1.6, ms=4)
            if key == "flops/mse":
                points = [(r["at"], r["limit/mse"]) for r in here if r["variant"] == "MSE"]
                ax.plot(*zip(*points, strict=True), ":", color=colours["limit"], label="limit", lw=2.2, zorder=5)
            at = sorted({r["at"] for r in here})
            ax.set_xscale("log", base=2)
            ax.set_xticks(at, [f"{x:g}" for x in at])
            ax.minorticks_off()
            ax.axhline(1, color="#999999", lw=0.8)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        axes[0][column].set_title(here[0]["title"], fontsize=10)
        axes[1][column].set_xlabel(axis)
    axes[0][0].set_ylabel("FLOPs / MSE step")
    axes[1][0].set_ylabel("peak memory / MSE step")
    handles, labels = axes[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    drawn.savefig(path, dpi=120)
    pyplot.close(drawn)


def _models(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(r["model"] for r in rows))


def _title(r: Row) -> str:
    return f"{r['model']}, {r['resolution']}"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3f}"


def _table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(head)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *lines))
