"""Why does the objective help or not? Measure a base and variants of it, and draw what was found.

    python benchmarks/evidence/why.py base mse-equal-compute sp recommended --model fashion-unet --device cuda

Recipes are those of `_plan.py`; one that is not trained yet is trained first. Numbers go to `why.json`, figures to
`docs/images`. What is measured: x̂_0 along the sampling trajectory from equal noise; the spectrum of samples, and whether the
grid of the model stands out in it; the loss by time; what the teacher sees of errors by spatial frequency; the gradients of MSE
and of the paper's objective alone; and what is left of the latter's where MSE has its minimum, for several ways to draw t'.
"""

import argparse
import json
import re
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from _bases import BASES
from _why import BANDS, GUIDED, PERIODS, Found, Study
from matplotlib.figure import Figure
from run import ROOT, Budget, commit, fine_tuned, hardware
from torch import Tensor

from perceptual_diffusion import PAPER, SelfPerceptualObjective
from perceptual_diffusion.cli.files import write
from perceptual_diffusion.cli.training import Interrupted

# --- figures --------------------------------------------------------------------------------------------------------------


def draw(found: Found, steps: list[float], trajectories: dict[str, Tensor], folder: Path, base: str) -> None:
    """Draw the five figures of a base."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "trajectory": draw_trajectories(steps, trajectories), "spectrum": draw_spectra(found), "errors": draw_errors(found),
        "teacher": draw_teacher(found), "left": draw_left(found),
    }  # fmt: skip
    for name, figure in figures.items():
        figure.savefig(folder / f"evidence_{base}_{name}.png", dpi=90, bbox_inches="tight")


def draw_trajectories(steps: list[float], found: dict[str, Tensor]) -> Figure:
    """One row per model from each noise."""
    count, _, _, size = next(iter(found.values())).shape[1:]
    figure = Figure(figsize=(1.9 + 0.7 * len(steps), 0.4 + count * (0.72 * len(found) + 0.15)), layout="constrained")
    blocks = figure.subplots(count, 1, squeeze=False)[:, 0]
    for k, axes in enumerate(blocks):
        rows = [torch.cat(list(pictures[:, k]), -1) for pictures in found.values()]
        image = (torch.cat(rows, -2).clamp(-1, 1) + 1) / 2
        axes.imshow(image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
        axes.set_yticks([size * (i + 0.5) for i in range(len(found))], list(found))
        last = axes is blocks[-1]
        axes.set_xticks(
            [size * (i + 0.5) for i in range(len(steps))] if last else [], [f"{t:g}" for t in steps] if last else []
        )
        axes.tick_params(length=0)
    blocks[-1].set_xlabel("x̂_0 at timestep t")
    return figure


def draw_spectra(found: Found) -> Figure:
    """Power over that of held-out pictures, and how far the frequencies of the grid stand out."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    power, grid = (found["spectra"][key] for key in ("power", "grid"))
    colours = {"held out": "black", "training": "0.6"} | {name: f"C{k}" for k, name in enumerate(found["gradients"])}
    for place, name in enumerate(power):
        of = name.removesuffix(GUIDED)
        left.plot(power[name] / power["held out"], ".-" if of == name else ".:", color=colours[of], label=name)
        shifted = [k + 0.6 * ((place + 0.5) / len(power) - 0.5) for k in range(len(PERIODS))]
        right.plot(shifted, grid[name], "o", mfc=None if of == name else "none", color=colours[of], label=name)
    for period in PERIODS:
        left.axvline(32 / period, color="0.9", linewidth=5, zorder=0)
    titles = (
        "radially averaged power of samples, over that of held-out pictures",
        "power at the frequencies of the grid, over that at their neighbours",
    )
    _axes(left, titles[0], "cycles per picture (grey: the grid's)", "ratio")
    _log(left)
    _log(right)
    right.set_xticks(range(len(PERIODS)), [f"{period}" for period in PERIODS])
    right.set_xlim(-0.6, len(PERIODS) - 0.4)
    _axes(right, titles[1], "period of the grid, pixels", "ratio")
    return figure


def draw_errors(found: Found) -> Figure:
    """The loss by t, and the error of x̂_0 by spatial frequency, against the first model's."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    whole, by_time, by_frequency = figure.subplots(1, 3)
    first = next(iter(found["losses"]["by frequency"].values())).mean(0)
    for name, values in found["losses"]["by time"].items():
        t = found["times"]
        whole.plot(t, values["prediction"], marker=".", label=name)
        by_time.errorbar(
            t, values["ratio prediction"], values["error of ratio prediction"], marker=".", capsize=3, label=name
        )
        by_frequency.plot(BANDS, found["losses"]["by frequency"][name].mean(0) / first, marker=".", label=name)
    _log(whole)
    name = next(iter(found["losses"]["by time"]))
    _axes(whole, "MSE of the prediction, held-out pictures", "t", "mean squared error")
    _axes(by_time, f"the same over that of {name}", "t", "ratio, and its standard error")
    _axes(by_frequency, f"squared error of x̂_0 over that of {name}, all t", "cycles per picture", "ratio")
    return figure


def draw_teacher(found: Found) -> Figure:
    """What the teacher sees by spatial frequency, how the two gradients are spread over it, and their angle by t."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    sight, spread, angle = figure.subplots(1, 3)
    unseen, count = found["unseen"], len(found["times"])
    for t, values, white in zip(unseen["t_prime"].tolist(), unseen["seen"], unseen["white"], strict=True):
        sight.plot(BANDS, values / white, marker=".", label=f"t' = {t:g}")
    _log(sight)
    _axes(
        sight,
        "change of the teacher's features by an error of x̂_0\nin one band, over that by white noise of its size",
        "cycles per picture",
        "ratio of squares",
    )
    name, first = next(iter(found["gradients"].items()))
    for loss, colour in (("sp", "C3"), ("mse", "C0")):
        for place, style in ((1, ":"), (count // 2, "--"), (count - 2, "-")):
            label = f"L_{loss}, t about {found['times'][place]:g}"
            spread.plot(BANDS, first[f"share of {loss}"][place], style, color=colour, marker=".", label=label)
    _log(spread)
    _axes(spread, f"energy of the gradient over the prediction, {name}", "cycles per picture", "share")
    for place, (name, values) in enumerate(found["gradients"].items()):
        angle.plot(found["times"], values["cosine"], color=f"C{place}", marker=".", label=name)
        for loss, style in (("sp", "--"), ("mse", ":")):
            label = f"L_{loss} with itself on other pictures" if not place else None
            angle.plot(found["times"], values[f"repeat of {loss}"], style, color=f"C{place}", linewidth=1, label=label)
    angle.set_ylim(min(0, angle.get_ylim()[0]), 1.02)
    _axes(angle, "cosine of the gradients of L_sp and L_mse, weights", "t", "cosine")
    angle.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return figure


def draw_left(found: Found) -> Figure:
    """What is left of L_sp's gradient where MSE has its minimum, by t and the way to draw t'."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in found["left"].items():
        axes.errorbar(found["times"], values["mean"], values["error"], marker=".", capsize=3, label=f"t' {name}")
    _log(axes)
    axes.yaxis.set_major_formatter("{x:.0e}")
    _axes(axes, "part of L_sp's gradient that is left where MSE has its minimum", "t", "|mean|² / mean of squares")
    return figure


def _log(axes: Any) -> None:
    """Make the y axis logarithmic, with plain numbers beside it."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
    axes.tick_params(which="minor", labelsize=7)


def _axes(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


# --- command --------------------------------------------------------------------------------------------------------------


def text(found: Found) -> str:
    """Write what was found as JSON, numbers to five digits, a list of them on a line."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, Tensor | list):
            return [plain(item) for item in (value.tolist() if isinstance(value, Tensor) else value)]
        return float(f"{value:.5g}") if isinstance(value, float) else value

    whole = json.dumps(plain(found), indent=1, allow_nan=False)
    return re.sub(r"\[\n[^][{}\"]*\]", lambda match: " ".join(match[0].split()), whole) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipes", nargs="+", help="of `_plan.py`; the first is what the others are compared with: base"
    )
    parser.add_argument("--model", default="fashion-unet", choices=BASES)
    parser.add_argument("--n", type=int, default=1000, help="pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder of the JSON and the figures; default: those of the repository")
    options = parser.parse_args(arguments)
    commit()  # asked once, at the start
    torch.set_num_threads(options.threads)
    base, stop = BASES[options.model], Budget(1e6)
    with stop.listening():
        models = {name: fine_tuned(base, name, options.seed, options.device, stop).eval() for name in options.recipes}
    teacher = SelfPerceptualObjective.wrap(base.read().to(options.device), base.scheduler(), seed=options.seed, **PAPER)
    given = {"n": options.n, "seed": options.seed, "device": options.device}
    study = Study(base=base, models=models, objective=teacher, **given)
    about = {
        "command": shlex.join(["python", "benchmarks/evidence/why.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "commit": commit() or "unknown", "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(options.device), "torch": torch.__version__, "n": options.n, "seed": options.seed,
    }  # fmt: skip
    found = study.measure()
    steps, trajectories = study.trajectories()
    path = (options.out or Path(__file__).parent) / "why.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write(path, text(kept | {base.name: about | found}))
    draw(found, steps, trajectories, options.out or ROOT / "docs/images", base.name)


if __name__ == "__main__":
    try:
        main()
    except Interrupted:
        print("stopped; the same command goes on")
