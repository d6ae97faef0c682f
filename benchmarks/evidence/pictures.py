"""Show what recipes make of equal noise: `python benchmarks/evidence/pictures.py fashion-unet-unconditional`.

The samples are those that `run.py` has left under `runs/evidence`, 25 steps: the first rows of each recipe of the first comparison that is
there, one under another, chosen by nobody. The figure goes to `docs/images`.
"""

import argparse
from pathlib import Path

from _bases import BASES, Base
from _plan import COMPARED, GUIDED, WHOLE
from matplotlib.figure import Figure
from matplotlib.image import imread
from run import ROOT, shown

BORDER, ROWS = 2, 2
"""Pixels between two samples; rows of samples shown of each recipe."""
WAYS = {"base": ("base", WHOLE), "base, guidance 3": ("base", GUIDED[0])} | {name: (name, WHOLE) for name in COMPARED}
"""What is shown: a recipe, and how it is sampled."""


def find(base: Base, seed: int) -> dict[str, Path]:
    """Find the samples there are.

    Raises:
        FileNotFoundError: there are none.
    """
    places = {title: shown(base, *way, seed) for title, way in WAYS.items()}
    files = {title: place.with_name(f"{place.name}.png") for title, place in places.items()}
    found = {title: path for title, path in files.items() if path.exists()}
    if not found:
        raise FileNotFoundError(
            f"no samples of {base.name!r}, seed {seed}. Make them by run.py, which measures them, too."
        )
    return found


def draw(pictures: dict[str, Path], height: int) -> Figure:
    """Draw the first rows of each file of samples, `height` pixels each."""
    found = {title: imread(path)[: ROWS * (height + BORDER) + BORDER] for title, path in pictures.items()}
    tall, wide = next(iter(found.values())).shape[:2]
    figure = Figure(figsize=(8, len(found) * (8 * tall / wide + 0.35)), layout="constrained")
    for axes, (title, image) in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found.items(), strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(title, fontsize=10, loc="left")
        axes.axis("off")
    return figure


def main() -> None:
    """Write the figure of a base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=BASES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    base = BASES[options.base]
    try:
        figure = draw(find(base, options.seed), base.train.images.shape[-1])
    except FileNotFoundError as error:
        parser.exit(2, f"{error}\n")
    figure.savefig(ROOT / f"docs/images/evidence_{base.name}_samples.png", dpi=90)


if __name__ == "__main__":
    main()
