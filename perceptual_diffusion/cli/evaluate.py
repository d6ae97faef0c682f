"""`perceptual-diffusion evaluate`: how two sets of pictures differ, in the features of a named network.

A and B are folders of pictures or pipelines, of which samples are drawn. N stands beside every number.
"""

import re
import tempfile
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perceptual_diffusion.cli import _paths, metrics, sample, samplers, sampling
from perceptual_diffusion.cli._errors import UserError, plain
from perceptual_diffusion.cli.files import write_folder
from perceptual_diffusion.cli.held import disk_error, hold
from perceptual_diffusion.cli.inception import Inception
from perceptual_diffusion.cli.seeing import LEAST, THUMBNAIL, Seen, files, see
from perceptual_diffusion.cli.training import Interrupted, Stop

NETWORKS = ("efflite0", "inception")
FEW = 1000
"""Below this many pictures there is a warning."""
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How sets are compared; `seed` is that of KID's subsets and of the halves."""

    network: str = "efflite0"
    weights: str | None = None
    resolution: int = metrics.RESOLUTION
    seed: int = 0
    device: str = "auto"
    train: str | None = None
    half_error: bool = False

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise UserError(f"--network is {self.network!r}, expected one of {', '.join(NETWORKS)}.")
        if not 32 <= self.resolution <= 1024:
            raise UserError(f"--resolution is {self.resolution}, expected a whole number from 32 to 1024.")
        if self.network == "inception" and self.resolution != metrics.RESOLUTION:
            raise UserError("--resolution is given, but Inception sees 299 x 299 pixels, always. Leave it out.")
        if self.network != "inception" and self.weights is not None:
            raise UserError("--weights is given, but only --network inception needs it. Leave it out.")


def run(
    a: str,
    b: str,
    settings: Settings,
    sampling: samplers.Settings,
    *,
    keep: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Compare two sets of pictures.

    Args:
        a: what is judged: a folder of pictures, or a pipeline's folder or hub id.
        b: what it is compared with, the same; for precision and recall these are the real pictures.
        settings: how they are compared.
        sampling: how a pipeline is sampled; without `n` as often as the other folder has pictures.
        keep: the folder in which samples are kept.
        overwrite: whether an earlier such folder is replaced.

    Returns:
        the facts, as JSON can hold them; None if it was interrupted.

    Raises:
        UserError: a set, a model or a setting cannot be used.
    """
    named = {"a": a, "b": b}
    made = {key for key, name in named.items() if _is_model(name)}
    if made and sampling.n is not None and sampling.n < LEAST:
        raise UserError(f"--n is {sampling.n}, and at least {LEAST} pictures are needed to compare sets.")
    if keep is not None:
        if len(made) != 1:
            raise UserError(
                f"--samples keeps the samples of one model, and {len(made) or 'none'} of A and B is one. Leave it out."
            )
        keep = _paths.path(keep, "--samples").resolve()
    network = _network(settings)
    paths = {key: files(_paths.path(name, key.upper())) for key, name in named.items() if key not in made}
    train = None if settings.train is None else files(_paths.path(settings.train, "--train"))
    facts: dict[str, Any] = {"network": _about(network), "settings": asdict(settings), "versions": samplers.versions()}
    try:
        held = nullcontext() if keep is None else hold(keep, lambda: sample.check_out(keep, overwrite))
        with Stop().listening() as stop, held, tempfile.TemporaryDirectory() as temporary:
            small = train is not None
            sets = {key: see(network, key.upper(), found, stop, small=small) for key, found in paths.items()}
            table = None if train is None else see(network, "train", train, stop, small=True)
            for key in sorted(made):  # last, for the folders to be refused before the long work
                other = next((name for name in named if name not in made), None)
                count = FEW if other is None else len(sets[other].features)
                source = None if other is None else Path(named[other]).expanduser()
                sampler = samplers.Sampler(
                    named[key],
                    replace(sampling, n=sampling.n or count, lora=sampling.lora if key == min(made) else None),
                    source,
                )
                root = keep or Path(temporary, key)
                _draw(sampler, root, stop)
                sets[key] = see(network, key.upper(), files(root), stop, small=small)
                facts[key] = {"samples": sampler.facts()}
    except (Interrupted, KeyboardInterrupt):
        return None
    except OSError as error:
        raise disk_error(error) from error
    for key in ("a", "b"):
        seen = sets[key]
        about = {"path": named[key], "n": len(seen.features), "sizes": list(seen.sizes), "broken": list(seen.broken)}
        facts[key] = about | facts.get(key, {})
    name = facts["network"]["name"]
    facts["metrics"] = _measure(name, sets["a"], sets["b"], settings.seed)
    if settings.half_error:
        facts["halves of b"] = _measure(name, *_halves(sets["b"], settings.seed), settings.seed)
    if table is not None:
        others = [key for key in sorted(sets) if paths.get(key) != train]
        near = {key: metrics.nearest(table.thumbnails, sets[key].thumbnails) for key in others}
        facts["train"] = {"path": settings.train, "n": len(table.thumbnails), "broken": list(table.broken)} | {
            key: {"mean": float(found.mean()), "least": float(found.min()), "n": len(found)}
            for key, found in near.items()
        }
    return facts | {"warnings": _warn(facts, len({*sets["a"].digests} & {*sets["b"].digests}))}


def _draw(sampler: samplers.Sampler, root: Path, stop: Stop) -> None:
    def fill(folder: Path) -> None:
        sample.draw(sampler, folder, stop)

    write_folder(root, fill)


def _is_model(name: str) -> bool:
    """Whether it is a pipeline: its folder, or, where there is no such folder, a hub id."""
    path = _paths.path(name, "A or B")
    return (path / "model_index.json").is_file() or (not path.exists() and re.fullmatch(HUB_ID, name) is not None)


def _network(settings: Settings) -> nn.Module:
    device = sampling.device(settings.device)
    if settings.network == "inception":
        return Inception(None if settings.weights is None else _paths.path(settings.weights, "--weights")).to(device)
    return metrics.Network(settings.resolution).to(device)


def _about(network: nn.Module) -> dict[str, Any]:
    if isinstance(network, Inception):
        return {"name": "Inception", "what": "torch-fidelity's Inception v3", "resolution": 299}
    size = int(network.resolution)  # type: ignore[arg-type]
    name = metrics.NETWORK if size == metrics.RESOLUTION else f"{metrics.NETWORK}@{size}"
    return {"name": name, "what": "EfficientNet-Lite0, trained on ImageNet", "resolution": size}


def _halves(seen: Seen, seed: int) -> tuple[Seen, Seen]:
    order = torch.randperm(len(seen.features), generator=torch.Generator().manual_seed(seed))
    half = len(order) // 2
    one, other = (
        replace(seen, features=seen.features[i], logits=seen.logits[i]) for i in order[: 2 * half].split(half)
    )
    return one, other


def _measure(name: str, a: Seen, b: Seen, seed: int) -> dict[str, Any]:
    """Every metric, with what it was taken of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance`")
        found = metrics.compare(b.features, a.features, seed=seed, network=name)
    precision, recall = metrics.precision_recall(b.features, a.features)
    n = [len(a.features), len(b.features)]
    return {
        "FID" if name == "Inception" else f"FD-{name}": {"value": found[f"FD-{name}"], "n": n},
        f"KID-{name}": {
            "value": found[f"KID-{name}"], "± over subsets": found[f"KID-{name} ±"],
            "subset": metrics.subset_size(*n), "times": 1000, "n": n,
        },
        f"precision-{name}": {"value": precision, "neighbours": metrics.NEIGHBOURS, "n": n},
        f"recall-{name}": {"value": recall, "neighbours": metrics.NEIGHBOURS, "n": n},
        f"CS-{name}": {"value": metrics.classifier_score(a.logits), "of b": metrics.classifier_score(b.logits), "n": n},
    }  # fmt: skip


def _warn(facts: dict[str, Any], shared: int) -> list[str]:
    n_a, n_b = facts["a"]["n"], facts["b"]["n"]
    found = []
    if n_a != n_b:
        found.append(
            f"N differs ({n_a} and {n_b}). Fréchet distances, precision and recall depend on N: compare at equal N."
        )
    if min(n_a, n_b) < FEW:
        found.append(f"N is below {FEW}: all of these are biased or noisy at few pictures, the Fréchet distance most.")
    if shared:
        found.append(
            f"pictures in both A and B: {shared}. KID is the lower for them, even below 0, precision and recall the higher."
        )
    sizes = {key: facts[key]["sizes"] for key in ("a", "b")}
    if sizes["a"] != sizes["b"] or len(sizes["a"]) > 1:
        found.append(
            f"the pictures differ in size; each was resized to {facts['network']['resolution']} x {facts['network']['resolution']}."
        )
    for key in ("a", "b", "train"):
        if broken := facts.get(key, {}).get("broken"):
            first = "; ".join(broken[:3])
            found.append(
                f"{len(broken)} files of {key.upper() if len(key) == 1 else key} cannot be read and are left out: {first}{' …' if len(broken) > 3 else ''}"
            )
    return found


def show(facts: dict[str, Any]) -> None:
    """Print the facts as a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 140
    for key in ("a", "b"):
        about = facts[key]
        what = f", samples of seeds from {about['samples']['settings']['seed']}" if "samples" in about else ""
        console.print(
            f"{key.upper()}  {plain(about['path'])}{what}: N = {about['n']}, {', '.join(about['sizes'][:3])}",
            soft_wrap=True,
        )
    network = facts["network"]
    console.print(
        f"{network['name']}: {network['what']}; pictures resized to {network['resolution']} x {network['resolution']}"
    )
    halves = facts.get("halves of b", {})
    columns = ("", "A against B", "N", *(("half of B against half", "N") if halves else ()))
    table = Table(*columns, box=None, header_style="bold")
    for name, row in facts["metrics"].items():
        rows = (row, halves[name]) if halves else (row,)
        cells = [cell for each in rows for cell in (_number(each), ", ".join(map(str, each["n"])))]
        table.add_row(name + (f" (x {row['times']})" if "times" in row else ""), *cells)
    console.print(table)
    if train := facts.get("train"):
        for key in (key for key in ("a", "b") if key in train):
            near = train[key]
            console.print(
                f"{key.upper()} to the nearest of {train['n']} training pictures: {near['mean']:.3f} on average, {near['least']:.3f} at least "
                f"(root mean square, {THUMBNAIL} x {THUMBNAIL} pixels in [0, 1], N = {near['n']})", soft_wrap=True
            )  # fmt: skip
    for line in facts["warnings"]:
        console.print(f"note: {plain(line)}", soft_wrap=True)


def _number(row: dict[str, Any]) -> str:
    text = _short(row["value"])
    if "± over subsets" in row:
        text += f" ± {_short(row['± over subsets'])} (50 subsets of {row['subset']})"
    return text + (f" (B: {_short(row['of b'])})" if "of b" in row else "")


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
