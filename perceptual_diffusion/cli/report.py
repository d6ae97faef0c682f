"""Pictures and the self-contained report of the demo."""

import base64
import html
import io
from typing import Any

import torch
from torch import Tensor

from perceptual_diffusion.cli.datasets import to_images

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.lead, figcaption, td.note { color: #57606a; }
.grids { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; }
figure { margin: 0; } img { max-width: 100%; border: 1px solid #d0d7de; border-radius: 4px; }
.grids img { width: 100%; image-rendering: pixelated; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #d0d7de; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
"""


def png(images: Tensor, columns: int, scale: int = 2) -> bytes:
    """Lay uint8 pictures (N, 3, H, W) out in a grid and give it as PNG."""
    from PIL import Image
    from torchvision.utils import make_grid

    grid = make_grid(images.cpu(), columns, padding=2, pad_value=255).permute(1, 2, 0).numpy()
    picture = Image.fromarray(grid)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def comparison(grids: dict[str, bytes]) -> bytes:
    """Set PNG grids side by side under their names, as one PNG."""
    from PIL import Image, ImageDraw, ImageFont

    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in grids.values()]
    gap, head = 24, 40
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(p.height for p in pictures) + head), "white")
    draw, left = ImageDraw.Draw(sheet), 0
    for name, picture in zip(grids, pictures, strict=True):
        draw.text((left + 4, 8), name, fill="#1b1f24", font=ImageFont.load_default(22))
        sheet.paste(picture, (left, head))
        left += picture.width + gap
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def trajectory_png(rows: dict[str, Tensor], timesteps: list[int]) -> bytes:
    """Draw x̂_0 along the trajectory: for each model, shape (K, N, 12, h, w), one line per sample, K columns."""
    from matplotlib.figure import Figure

    count = next(iter(rows.values())).shape[1]
    figure = Figure(
        figsize=(1.15 * len(timesteps) + 1.8, 1.15 * len(rows) * count + 0.5), layout="constrained", dpi=100
    )
    axes = figure.subplots(len(rows) * count, len(timesteps), squeeze=False)
    for line, (name, clean) in enumerate(rows.items()):
        for sample in range(count):
            for column, picture in enumerate(to_images(clean[:, sample])):
                ax = axes[line * count + sample][column]
                ax.imshow(picture.permute(1, 2, 0).numpy())
                ax.set_xticks([])
                ax.set_yticks([])
                ax.spines[:].set_color("#d0d7de")
                if line == 0 and sample == 0:
                    ax.set_title(f"t = {timesteps[column]}", fontsize=9)
            if sample == 0:
                axes[line * count][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return _figure_png(figure)


def loss_png(histories: dict[str, list[dict[str, float]]], flops: dict[str, int]) -> bytes:
    """Plot the losses of the runs against the compute spent on them, each a mean over 25 steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained", dpi=100)
    left, right = figure.subplots(1, 2)
    for name, history in histories.items():
        for ax, term in ((left, "mse"), (right, "sp")):
            values = [row[term] for row in history if term in row]
            if not values:
                continue
            window = min(25, len(values))
            smooth = torch.tensor(values).unfold(0, window, 1).mean(1)
            compute = [(i + window) * flops[name] / 1e12 for i in range(len(smooth))]
            ax.plot(compute, smooth.tolist(), label=name, linewidth=1.4)
    for ax, title in ((left, "L_mse, the error of the prediction"), (right, "L_sp, the self-perceptual loss")):
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("training compute (TFLOP)")
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=8)
    return _figure_png(figure)


def _figure_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


CLEAR = 0.02
"""A relative difference of a metric without an error estimate that counts as a change."""


def verdict(
    rows: list[dict[str, Any]], metrics: list[str], differences: dict[str, tuple[float, float]] | None = None
) -> list[str]:
    """Say, for each metric, whether the objective's samples are better or worse than MSE's at the same compute.

    Args:
        rows: the metrics of each model.
        metrics: names of the metrics, all of them better when lower.
        differences: for some metrics, the difference to MSE and its standard error: twice the error counts as a
            change. Without one, 2 % does.
    """
    by_name = {row["model"]: row for row in rows}
    sentences = []
    for metric in metrics:
        ours, control, base, guided = (by_name[n][metric] for n in ("self-perceptual", "mse", "base", "guidance"))
        difference, error = (differences or {}).get(metric, (ours - control, CLEAR * abs(control) / 2))
        if abs(difference) <= 2 * error:
            judged = f"no clear change against MSE (below {number(2 * error)} is taken for noise)"
        else:
            judged = f"{'better' if difference < 0 else 'WORSE'} than MSE by {number(abs(difference))}, {abs(difference / control):.1%}"
            judged += f" (standard error {number(error)})" if metric in (differences or {}) else ""
        sentences.append(
            f"{metric}, lower is better: self-perceptual {number(ours)}, MSE at the same compute {number(control)}, "
            f"base {number(base)}, base with guidance {number(guided)}: {judged}."
        )
    return sentences


def number(value: float) -> str:
    """Write a number with at least three digits and no exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(row: dict[str, Any], metric: str) -> str:
    """Write a metric of a row, with its standard deviation where it has one."""
    error = row.get(f"{metric} ±")
    return number(row[metric]) + (f" ± {number(error)}" if error is not None else "")


def page(facts: dict[str, Any], pictures: dict[str, bytes], grids: dict[str, str], metrics: list[str]) -> str:
    """Write the report: one HTML page that needs no other file.

    Args:
        facts: what `metrics.json` holds.
        pictures: PNG data by file name.
        grids: file names of the sample grids by caption.
        metrics: names of the metric columns.
    """

    def image(name: str, alt: str) -> str:
        return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(pictures[name]).decode()}">'

    figures = "".join(
        f"<figure>{image(name, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, name in grids.items()
    )
    header = "".join(
        f"<th>{html.escape(name)}</th>"
        for name in ["samples of", *metrics, "distance to training set", "N", "passes per step", "training TFLOP"]
    )
    body = "".join(
        "<tr>"
        + f"<td>{html.escape(row['label'])}</td>"
        + "".join(f"<td>{cell(row, metric)}</td>" for metric in metrics)
        + f"<td>{row['nearest']:.3f}</td><td>{row['n']}</td>"
        + (f"<td>{row['passes']}</td><td>{row['tflop']:.1f}</td>" if row["passes"] else "<td>–</td><td>–</td>")
        + "</tr>"
        for row in facts["rows"]
    )
    sentences = "".join(f"<li>{html.escape(s)}</li>" for s in facts["verdict"])
    settings = facts["settings"]
    about = (
        f"{settings['dataset']}, {facts['pictures']} training pictures, {settings['steps']} steps with the objective and {facts['mse_steps']} with MSE "
        f"(the same compute: a step with the objective costs {facts['cost_ratio']:.2f} × an MSE step), batch {facts['batch']}, learning rate {facts['lr']:g}, "
        f"seed {settings['seed']}, on {facts['hardware']}, {facts['date']}."
    )
    adapted = (
        f"<p>The packaged base knows emoji only: it was first fine-tuned on this data by MSE for {facts['base_steps']} steps.</p>"
        if facts["base_steps"]
        else ""
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>perceptual-diffusion demo</title><style>{STYLE}</style></head><body>
<h1>Self-perceptual fine-tuning: what changed</h1>
<p class="lead">{html.escape(about)}</p>{adapted}
<h2>Samples from the same noise</h2>
<p>25 steps of DDIM, trailing spacing, from the last timestep. One row per class. Guidance needs two passes per step; the others one.</p>
<div class="grids">{figures}</div>
<h2>Metrics</h2>
<div class="wide"><table><tr>{header}</tr>{body}</table></div>
<ul>{sentences}</ul>
<p class="lead">Features of {html.escape(facts["network"])}; a Fréchet distance in them is not FID, depends on N, and is compared at equal N only. KID is times 1000,
± is its standard deviation over subsets of half the samples; the standard error of a difference is that of paired samples, and does not cover the chance of the training run. The distance to the training set is the root mean square pixel difference to the nearest training picture: near 0 would mean copies.
The row of real pictures is {facts["real_n"]} training pictures against the rest. One seed: a small difference may be chance.</p>
<h2>The clean sample as predicted along the trajectory</h2>
<p>x̂_0 at timesteps from noise (left) to data (right), as in the paper's figure 5.</p>
<div class="wide">{image("trajectory.png", "predicted clean samples along the trajectory")}</div>
<h2>Losses</h2>
<div class="wide">{image("loss.png", "loss curves")}</div>
<p class="lead">Method: Lin &amp; Yang, Diffusion Model with Perceptual Loss, arXiv 2401.00110. Made by perceptual-diffusion {html.escape(facts["version"])}.</p>
</body></html>
"""
