"""`perceptual-diffusion sample`: pictures of a model, what they were made with, and grids of them.

The folder appears whole or not at all. With a second model, both start from the same noise.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from perceptual_diffusion.cli import _paths
from perceptual_diffusion.cli._errors import UserError, plain
from perceptual_diffusion.cli.files import write_folder
from perceptual_diffusion.cli.held import hold
from perceptual_diffusion.cli.samplers import Sampler, Settings
from perceptual_diffusion.cli.training import Interrupted, Stop

MADE_BY = "perceptual-diffusion sample"
RECORD = "samples.json"
GRID = 64
"""The largest number of pictures in a grid."""
NAMES = ("model", "other")
"""The folders of the two models of a comparison."""


def run(
    model: str,
    settings: Settings,
    *,
    out: Path,
    grid: bool = False,
    compare: str | None = None,
    overwrite: bool = False,
) -> bool:
    """Sample a model into a folder.

    Args:
        model: a folder of a diffusers pipeline, or a hub id.
        settings: how to sample.
        out: the folder that is made.
        grid: whether a grid of the first pictures is made too.
        compare: a second model, sampled from the same noise with the same settings, but without the LoRA.
        overwrite: whether an earlier folder of this command is replaced.

    Returns:
        whether it was finished; False if it was interrupted, and nothing written.

    Raises:
        UserError: the model, a setting or `out` cannot be used.
    """
    out = _paths.path(out, "--out").resolve()

    def fill(folder: Path) -> None:
        if compare is None:
            shown = draw(Sampler(model, settings), folder, stop)
            if grid:
                tile(shown).save(folder / "grid.png")
            return
        bare = replace(settings, lora=None)
        shape = Sampler(compare, bare).shape  # first, for its mistakes to be found before the long work
        grids = []
        for name, target, given in zip(NAMES, (model, compare), (settings, bare), strict=True):
            sampler = Sampler(target, given)
            if sampler.shape != shape:
                raise UserError(
                    f"--compare {compare!r} is of another size than {model!r}: they cannot share their noise."
                )
            (folder / name).mkdir()
            grids.append(tile(draw(sampler, folder / name, stop)))
        beside(grids, (model, compare)).save(folder / "compare.png")
        record = {"made by": MADE_BY, "compared": dict(zip(NAMES, (model, compare), strict=True))}
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    try:
        with Stop().listening() as stop, hold(out, lambda: check_out(out, overwrite)):
            write_folder(out, fill)
    except (Interrupted, KeyboardInterrupt):
        return False
    except OSError as error:
        raise UserError(
            f"--out {str(out)!r} cannot be written: {error.strerror or error}. Give another folder."
        ) from error
    return True


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is one of this command's and may be replaced."""
    try:
        free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise UserError(f"--out {str(out)!r} cannot be read: {error.strerror}. Give another folder.") from error
    if free:
        return
    if not out.is_dir():
        raise UserError(f"--out is {str(out)!r}, which is a file. Give a folder.")
    if not overwrite:
        raise UserError(
            f"--out {str(out)!r} is not empty. Give another folder, or --overwrite for an earlier one of this command."
        )
    ours = {RECORD, "grid.png", "compare.png", *NAMES, *(f"{name}/{RECORD}" for name in NAMES)}
    try:
        for name in ("", *(f"{name}/" for name in NAMES)):
            record = _paths.mark(out / name / RECORD, MADE_BY) or {}
            ours |= {f"{name}{row['file']}" for row in record.get("pictures", [])}
        strange = sorted({str(path.relative_to(out)) for path in out.rglob("*")} - ours)
    except (OSError, KeyError, TypeError):
        strange = [RECORD]
    if strange or _paths.mark(out / RECORD, MADE_BY) is None:
        raise UserError(
            f"--out {str(out)!r} holds what this command did not make ({(strange or [RECORD])[0]}). Give another folder."
        )


def draw(sampler: Sampler, folder: Path, stop: Stop) -> list[Any]:
    """Sample pictures into a folder, with the record of how they were made.

    Args:
        sampler: what makes them.
        folder: where they are written.
        stop: asked after each batch.

    Returns:
        the first pictures (PIL), for a grid.

    Raises:
        Interrupted: a stop was asked for.
    """
    n, rows, shown = sampler.n, list[dict[str, Any]](), list[Any]()
    with progress() as bar:
        task = bar.add_task(f"sampling {plain(Path(sampler.name).name)}", total=n)
        for batch in sampler.pictures():
            for row, picture in batch:
                name = f"{len(rows):0{len(str(n - 1)):d}d}.png"
                picture.save(folder / name)
                rows.append({"file": name, **row})
                if len(shown) < GRID:
                    shown.append(picture)
            bar.advance(task, len(batch))
            stop.check()
    record = {"made by": MADE_BY, **sampler.facts(), "pictures": rows}
    (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return shown


def tile(pictures: list[Any], gap: int = 2) -> Any:
    """Give a grid of pictures of one size, about as wide as high."""
    from PIL import Image

    columns = max(1, round(len(pictures) ** 0.5 + 0.49))
    width, height = (extent + gap for extent in pictures[0].size)
    sheet = Image.new("RGB", (columns * width - gap, -(-len(pictures) // columns) * height - gap), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture.convert("RGB"), (index % columns * width, index // columns * height))
    return sheet


def beside(grids: list[Any], names: tuple[str, ...], gap: int = 16) -> Any:
    """Put grids of one size side by side, under their names."""
    from PIL import Image, ImageDraw

    width, height = grids[0].size
    sheet = Image.new("RGB", (len(grids) * (width + gap) - gap, height + gap), "white")
    for index, (each, name) in enumerate(zip(grids, names, strict=True)):
        ImageDraw.Draw(sheet).text((index * (width + gap), 2), name[-max(4, width // 7) :], "black")
        sheet.paste(each, (index * (width + gap), gap))
    return sheet


def progress() -> Any:
    """Give a progress bar on the error stream."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=16), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
