"""Show what recipes make of equal noise: `python benchmarks/evidence/pictures.py fashion-unet-unconditional`.

The first samples of a seed, 25 steps, each column from one noise. A recipe that is not trained yet on this machine is trained first.
The figure goes to `docs/images`.
"""

import argparse

import torch
from _bases import BASES, Base
from _plan import GUIDED, WHOLE, Sampling
from matplotlib.figure import Figure
from run import ROOT, Budget, draw, fine_tuned
from torch import Tensor
from torchvision.utils import make_grid

from perceptual_diffusion.cli.training import Interrupted

SHOWN: dict[str, tuple[str, Sampling]] = {
    "base": ("base", WHOLE),
    "base, guidance 3": ("base", GUIDED[0]),
    "MSE, same compute": ("mse-equal-compute", WHOLE),
    "recommended": ("recommended", WHOLE),
}
"""What is shown: a recipe, and how it is sampled; guidance only of a model that is told the class."""
ROWS = 2
"""Samples shown of each class."""


def make(base: Base, seed: int, device: str, stop: Budget) -> dict[str, Tensor]:
    """Sample: uint8 pictures of each of `SHOWN`, the classes in turn."""
    return {
        title: draw(base, fine_tuned(base, name, seed, device, stop), how, seed=seed, n=ROWS * base.null, device=device)[0]
        for title, (name, how) in SHOWN.items()
        if base.conditional or how.guidance == 1
    }  # fmt: skip


def figure(made: dict[str, Tensor], columns: int) -> Figure:
    """Draw the samples of each recipe on a grid, one under another."""
    grids = {title: make_grid(pictures, nrow=columns).permute(1, 2, 0) for title, pictures in made.items()}
    tall, wide = next(iter(grids.values())).shape[:2]
    drawn = Figure(figsize=(8, len(grids) * (8 * tall / wide + 0.35)), layout="constrained")
    for axes, (title, grid) in zip(drawn.subplots(len(grids), 1, squeeze=False)[:, 0], grids.items(), strict=True):
        axes.imshow(grid.numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=10, loc="left")
        axes.axis("off")
    return drawn


def main() -> None:
    """Write the figure of a base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=BASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base, stop = BASES[options.base], Budget(1e6)
    try:
        with stop.listening():
            made = make(base, options.seed, options.device, stop)
    except Interrupted:
        parser.exit(1, "stopped; the same command goes on\n")
    figure(made, base.null).savefig(ROOT / f"docs/images/evidence_{base.name}_samples.png", dpi=90)


if __name__ == "__main__":
    main()
