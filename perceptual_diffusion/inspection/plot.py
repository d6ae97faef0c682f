"""A probe as text and as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceptual_diffusion.inspection.probe import Probe


def table(probe: "Probe") -> str:
    """Give a probe as text: one line per layer, in execution order."""
    kinds = list(probe.rows[0].sensitivity)
    place = {name: str(k + 1) for k, name in enumerate(probe.ranking)}
    lines = [
        ["layer", "rank", "structure", *kinds, "scale", "outlier", "eff.rank", "gradient by band", "cosine by band"]
    ]
    for row in probe.rows:
        numbers = [row.structure, *(_mean(row.sensitivity[kind]) for kind in kinds), row.scale, row.outlier, row.rank]
        by_band = [" ".join(map(_text, values)) for values in (row.gradient, row.cosine)]
        name = f"{row.name} *" if row.name in probe.middle else row.name
        lines.append([name, place[row.name], *map(_text, numbers), *by_band])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for first, *rest in lines:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *cells]))
    bands = ", ".join(f"{low:.4g} to {high:.4g}" for low, high in probe.bands)
    notes = [f"bands of t: {bands}; {probe.samples} samples, noised {probe.draws} times in each; * the middle"]
    return "\n".join([*text, *notes, *(f"{name} is not measured: {why}" for name, why in probe.skipped.items())])


def plot(probe: "Probe", path: str | Path) -> None:
    """Draw a probe: sensitivity, features, gradients and cosines over the layers.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a plot needs matplotlib, which is not installed. Run `pip install 'perceptual-diffusion[demo]'`.",
            name=error.name,
        ) from error
    names = [row.name for row in probe.rows]
    figure = Figure(figsize=(max(9.0, 0.75 * len(names) + 5), 8.5), layout="constrained", dpi=90)
    ((answers, features), (norms, cosines)) = figure.subplots(2, 2, sharex=True)
    for kind in probe.rows[0].sensitivity:
        _line(answers, [_mean(row.sensitivity[kind]) for row in probe.rows], kind)
    _line(answers, [row.structure for row in probe.rows], "geometric mean", color="black", linewidth=2)
    answers.set_title("change of the features, over that by white noise of equal norm", fontsize=10)
    _line(features, [row.outlier for row in probe.rows], "energy in the largest channel")
    _line(features, [row.rank for row in probe.rows], "effective rank / channels")
    features.set_title("features", fontsize=10)
    features.set_ylim(0, None)
    for band, (low, high) in enumerate(probe.bands):
        label = f"t = {low:.4g} to {high:.4g}"
        _line(norms, [row.gradient[band] for row in probe.rows], label)
        _line(cosines, [row.cosine[band] for row in probe.rows], label)
    norms.set_title(f"gradient of L_sp ({probe.distance}) over that of L_mse, norms", fontsize=10)
    cosines.set_title("cosine of the two gradients", fontsize=10)
    cosines.set_ylim(min(0.0, cosines.get_ylim()[0]), 1)
    for axes in (answers, norms):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        low, high = axes.get_ylim()
        if high < 30 * low:  # less than a decade or so has too few ticks of its own
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
            axes.tick_params(axis="y", which="minor", labelsize=8)
    for axes in (answers, features, norms, cosines):
        for middle in (k for k, name in enumerate(names) if name in probe.middle):
            axes.axvline(middle, color="0.8", linewidth=6, zorder=0)
        axes.grid(axis="y", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    for axes in (norms, cosines):
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    figure.savefig(path)


def _line(axes: Any, values: list[float | None], label: str, **style: Any) -> None:
    axes.plot(
        [float("nan") if value is None else value for value in values], marker="o", markersize=4, label=label, **style
    )


def _mean(values: tuple[float | None, ...]) -> float | None:
    """Geometric mean of what is known."""
    known = [value for value in values if value]
    product = 1.0
    for value in known:
        product *= value ** (1 / len(known))
    return product if known else None


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value < 100 else f"{value:.0f}"
