"""Arguments of the command."""

from pathlib import Path
from typing import Annotated

import typer

from perceptual_diffusion import __version__
from perceptual_diffusion.cli import _app_tools, _paths

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


@app.command(short_help="Fine-tune the packaged model, and compare with MSE.")
def demo(
    steps: Annotated[int, typer.Option(help="Steps of fine-tuning with the objective.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of data order, noise, dropout and samples.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for what is made.")] = Path("perceptual-diffusion-demo"),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.")] = "auto",
    dataset: Annotated[
        str, typer.Option(help="emoji, digits, fashion-mnist, or a folder of pictures (subfolders are classes).")
    ] = "emoji",
    samples: Annotated[int, typer.Option(help="Samples per model that the metrics see.")] = 256,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run in --out.")] = False,
) -> None:
    """Fine-tune the packaged model with the self-perceptual objective and with MSE, and compare their samples."""
    with _app_tools.refusing():
        from perceptual_diffusion.cli.demo import Settings, run

        out = _paths.path(out, "--out")
        _paths.refuse_links(out, f"--out {str(out)!r}")

        finished = run(
            Settings(steps=steps, seed=seed, device=device, dataset=dataset, samples=samples), out=out, resume=resume
        )
    if not finished:
        raise typer.Exit(130)


@app.command(short_help="Show a model's blocks, its middle, and what a step costs.")
def inspect(
    model: Annotated[
        str, typer.Argument(help="A folder of diffusers (a model or a pipeline), a hub id, or module:callable.")
    ],
    layers: Annotated[
        list[str] | None, typer.Option(help="Dotted name of a layer to compare; may be repeated.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Extent of the sample in the model's own grid: 64, 64x96, or 8x64x96.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Samples in the batch.")] = None,
    inputs: Annotated[
        str | None, typer.Option(help="module:callable that gives (clean, cond), instead of made-up ones.")
    ] = None,
    prediction: Annotated[str | None, typer.Option(help="What the model predicts, where nothing says it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Measure the layers on the batch; needs the weights.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the probe into this picture.")] = None,
) -> None:
    """Show a model's blocks, its middle, its schedule, and what a step of the objective costs; --probe ranks its layers."""
    from perceptual_diffusion.cli.inspect import Settings, run

    settings = Settings(
        target=model, layers=tuple(layers or ()), size=size, batch=batch, inputs=inputs, prediction=prediction,
        probe=probe, plot=plot,
    )  # fmt: skip
    with _app_tools.refusing():
        run(settings, as_json=as_json)


@app.command(short_help="Fine-tune a pipeline of diffusers on pictures.")
def train(
    config: Annotated[Path, typer.Argument(help="A TOML or JSON file: docs/cli.md lists its keys.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the config's `out`.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and the cost; write nothing.")] = False,
) -> None:
    """Fine-tune a pipeline of diffusers on a folder of pictures; `accelerate launch -m perceptual_diffusion train` on several devices."""
    with _app_tools.refusing():
        from perceptual_diffusion.cli.train import run

        finished = run(config, resume=resume, dry_run=dry_run)
    if not finished:
        raise typer.Exit(130)


_app_tools.add(app)
