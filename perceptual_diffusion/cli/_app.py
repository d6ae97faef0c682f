"""Arguments of the command."""

from pathlib import Path
from typing import Annotated

import typer

from perceptual_diffusion import __version__
from perceptual_diffusion.cli._errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A perceptual training loss for any diffusion or flow model, made by the model's own frozen copy."""


@app.command()
def demo(
    steps: Annotated[int, typer.Option(help="Steps of fine-tuning with the objective.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of data order, noise, dropout and samples.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for what is made.")] = Path("perceptual-diffusion-demo"),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.")] = "auto",
    dataset: Annotated[
        str, typer.Option(help="emoji, digits, fashion-mnist, or a folder of pictures (subfolders are classes).")
    ] = "emoji",
    samples: Annotated[int, typer.Option(help="Samples per model that the metrics see.")] = 256,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run in --out.")] = False,
) -> None:
    """Fine-tune the packaged model with the self-perceptual objective and with MSE, and compare their samples."""
    from perceptual_diffusion.cli.demo import Settings, run

    try:
        finished = run(
            Settings(steps=steps, seed=seed, device=device, dataset=dataset, samples=samples), out=out, resume=resume
        )
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    if not finished:
        raise typer.Exit(130)
