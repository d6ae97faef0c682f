"""Arguments of `sample`, `evaluate` and `doctor`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from perceptual_diffusion.cli._errors import UserError, plain

# what both commands say of sampling
N = Annotated[int | None, typer.Option(help="Pictures to sample; by default as many as prompts or classes, or 16.")]
Prompt = Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")]
Prompts = Annotated[Path | None, typer.Option(help="A text file with a prompt on each line.")]
Class = Annotated[list[str] | None, typer.Option("--class", help="A class, by index or name; may be repeated.")]
Steps = Annotated[int, typer.Option(help="Steps of the sampler.")]
Guidance = Annotated[float | None, typer.Option(help="Scale of the guidance; by default 1, none, or Flux's own 3.5.")]
Rescale = Annotated[float, typer.Option(help="How much of the guidance is rescaled (arXiv 2305.08891): 0 to 1.")]
Seed = Annotated[int, typer.Option(help="Picture i has the seed SEED + i.")]
Batch = Annotated[int, typer.Option(help="Pictures made at a time; changes none of them.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.")]
Precision = Annotated[str, typer.Option(help="no (float32), bf16 or fp16.")]
Size = Annotated[int | None, typer.Option(help="Height and width in pixels; by default the model's own.")]
Lora = Annotated[str | None, typer.Option(help="A folder with LoRA weights for the model.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier folder of this command.")]


@contextmanager
def refusing() -> Iterator[None]:
    """Print what the user can mend as one sentence, and exit with 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "perceptual_diffusion").split(".")[0]
        if package == "perceptual_diffusion":
            raise
        typer.echo(
            f"error: this needs {package!r}, which is not installed. Run `pip install 'perceptual-diffusion[demo]'`, and "
            "`pip install transformers peft` for models of text and their LoRA.", err=True
        )  # fmt: skip
        raise typer.Exit(2) from error
    except UserError as error:
        typer.echo(f"error: {plain(error)}", err=True)
        raise typer.Exit(2) from error


def _lines(prompt: list[str] | None, file: Path | None) -> tuple[str, ...]:
    """The prompts of the options and of a file."""
    if file is None:
        return tuple(prompt or ())
    if prompt:
        raise UserError("--prompt and --prompts are both given. Keep one of them.")
    try:
        found = tuple(line.strip() for line in file.expanduser().read_text("utf-8-sig").splitlines() if line.strip())
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8, or no such name"
        raise UserError(f"--prompts {str(file)!r} cannot be read: {reason}. Give a text file.") from error
    if not found:
        raise UserError(f"--prompts {str(file)!r} holds no prompt. Write one on each line.")
    return found


def _settings(*, prompt: list[str] | None, prompts: Path | None, labels: list[str] | None, **given: Any) -> Any:
    from perceptual_diffusion.cli.samplers import Settings

    return Settings(prompts=_lines(prompt, prompts), classes=tuple(labels or ()), **given)


def add(app: typer.Typer) -> None:
    """Give an app the commands `sample`, `evaluate` and `doctor`."""
    app.command(short_help="Sample pictures from a pipeline into a folder.")(sample)
    app.command(short_help="Compare folders of pictures, or a model with one.")(evaluate)
    app.command(short_help="Test whether everything is exact on this machine.")(doctor)


def sample(
    model: Annotated[str, typer.Argument(help="A folder of a diffusers pipeline, or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder that is made.")],
    n: N = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    labels: Class = None,
    steps: Steps = 25,
    guidance: Guidance = None,
    rescale: Rescale = 0.0,
    seed: Seed = 0,
    batch: Batch = 8,
    device: Device = "auto",
    precision: Precision = "no",
    size: Size = None,
    lora: Lora = None,
    grid: Annotated[bool, typer.Option("--grid", help="Write a grid of the first pictures too.")] = False,
    compare: Annotated[str | None, typer.Option(help="A second model, sampled from the same noise.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Sample pictures from a pipeline into a folder, each from a seed of its own."""
    from perceptual_diffusion.cli.sample import run

    with refusing():
        settings = _settings(
            n=n, prompt=prompt, prompts=prompts, labels=labels, steps=steps, guidance=guidance, rescale=rescale, seed=seed,
            batch=batch, device=device, precision=precision, size=size, lora=lora,
        )  # fmt: skip
        if not run(model, settings, out=out, grid=grid, compare=compare, overwrite=overwrite):
            raise typer.Exit(130)


def evaluate(
    a: Annotated[str, typer.Argument(metavar="A", help="What is judged: pictures in a folder, or a model.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What it is compared with, the real pictures: the same.")],
    network: Annotated[str, typer.Option(help="efflite0, or inception, the FID's.")] = "efflite0",
    weights: Annotated[str | None, typer.Option(help="File of Inception's weights; else they are fetched.")] = None,
    resolution: Annotated[int, typer.Option(help="Extent at which efflite0 sees the pictures.")] = 64,
    train: Annotated[str | None, typer.Option(help="Training pictures, to find the nearest of.")] = None,
    half_error: Annotated[
        bool, typer.Option("--half-error", help="Compare the halves of B too: what sampling alone makes of a number.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    samples: Annotated[Path | None, typer.Option(help="Folder in which a model's samples are kept.")] = None,
    n: Annotated[
        int | None, typer.Option(help="Pictures to sample; by default as many as the other folder holds.")
    ] = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    labels: Class = None,
    steps: Steps = 25,
    guidance: Guidance = None,
    rescale: Rescale = 0.0,
    seed: Seed = 0,
    batch: Batch = 8,
    device: Device = "auto",
    precision: Precision = "no",
    size: Size = None,
    lora: Lora = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare two folders of pictures, or a model's samples and a folder, in the features of a named network."""
    from perceptual_diffusion.cli.evaluate import Settings, run, show

    with refusing():
        sampling = _settings(
            n=n, prompt=prompt, prompts=prompts, labels=labels, steps=steps, guidance=guidance, rescale=rescale, seed=seed,
            batch=batch, device=device, precision=precision, size=size, lora=lora,
        )  # fmt: skip
        settings = Settings(
            network=network, weights=weights, resolution=resolution, seed=seed, device=device, train=train,
            half_error=half_error,
        )  # fmt: skip
        facts = run(a, b, settings, sampling, keep=samples, overwrite=overwrite)
    if facts is None:
        raise typer.Exit(130)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        show(facts)


def doctor(
    report: Annotated[bool, typer.Option("--report", help="Print Markdown to paste into an issue.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show this machine and what works on it, and test whether losses and gradients are right here."""
    from perceptual_diffusion.cli.doctor import run

    try:
        passed = run(report=report, as_json=as_json)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if not passed:
        raise typer.Exit(1)
