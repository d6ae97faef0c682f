"""The demo: fine-tune the packaged model with the objective and, for the same compute, with MSE; compare the samples."""

import contextlib
import json
import os
import platform
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perceptual_diffusion import __version__
from perceptual_diffusion.cli import _paths, datasets, metrics, report, sampling
from perceptual_diffusion.cli._errors import UserError, plain
from perceptual_diffusion.cli.files import check_key, digest, load_state, remove, save_state, write, write_folder
from perceptual_diffusion.cli.held import disk_error, hold
from perceptual_diffusion.cli.training import FineTuning, Interrupted, Stop

BATCH = 32
LR = 1e-4
SAMPLING_STEPS = 25
GUIDANCE = 3.0
BASE_STEPS = 300
OBJECTIVE: dict[str, Any] = {"distance": "normalised", "mse_weight": 1.0, "t_prime": "uniform"}
"""The recipe, arguments of `SelfPerceptualObjective.wrap`: docs/decisions/0007-the-recipe-of-the-demo.md."""
COLUMNS = 8
MADE_BY = "perceptual-diffusion demo"
METRICS = [f"FD-{metrics.NETWORK}", f"KID-{metrics.NETWORK}"]
LABELS = {
    "base": "base (MSE)",
    "guidance": f"base with guidance {GUIDANCE:g}",
    "mse": "MSE, same compute",
    "self-perceptual": "self-perceptual",
}
STATES = (*LABELS, *(f"samples-{name}" for name in LABELS))
"""What a run may have saved."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run depends on."""

    steps: int
    seed: int
    device: str
    dataset: str
    samples: int


def run(settings: Settings, *, out: Path, resume: bool) -> bool:
    """Run the demo.

    Args:
        settings: what to run.
        out: folder for what is made.
        resume: continue an interrupted run in `out`.

    Returns:
        whether it was finished; False if it was interrupted and can be resumed.

    Raises:
        UserError: a setting is wrong, or `out` cannot be used.
    """
    from rich.console import Console

    for name, value, least in (
        ("--steps", settings.steps, 1),
        ("--samples", settings.samples, 16),
        ("--seed", settings.seed, 0),
    ):
        if not least <= value < 2**31:
            raise UserError(f"{name} is {value}, expected a whole number from {least} to {2**31 - 1}.")
    device = sampling.device(settings.device)
    split = datasets.load(settings.dataset)
    console = Console(stderr=True, markup=False)
    # all that the result depends on; random streams differ between kinds of device
    data = digest({"images": split.train.images, "labels": split.train.labels})
    key = {**asdict(settings), "device": device.type, "data": data, "objective": OBJECTIVE, "lr": LR, "batch": BATCH}
    out = Path(os.path.realpath(_paths.path(out, "--out")))
    mark = out / "state" / "run.json"
    try:
        with Stop().listening() as stop, warnings.catch_warnings(), hold(out, lambda: _check(out, resume, key)):
            _begin(out, resume, console)
            if not resume:
                write(mark, json.dumps({"made by": MADE_BY, "saved": [], **key}, indent=1))
            warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance`")
            _Demo(settings, split, device, out, key, stop, console).run()
    except (Interrupted, KeyboardInterrupt):
        console.print(
            f"Stopped. What was done is kept in {plain(mark.parent)}; go on with the same command and --resume."
        )
        return False
    except OSError as error:
        raise disk_error(error, mark) from error
    return True


def _check(out: Path, resume: bool, key: dict[str, Any]) -> None:
    """Refuse a folder that cannot be used, to begin where a run was interrupted, and to go on where there is none or another one."""
    other = UserError(f"--out is {str(out)!r}, which holds other files. Give a new or an empty folder.")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is {str(out)!r}, which is a file. Give a folder.")
    if _paths.mark(out / "metrics.json", MADE_BY) is not None:
        if out == Path.cwd() and not resume:
            raise other
        return
    state = out / "state"
    mark = _paths.mark(state / "run.json", MADE_BY)
    if not resume:
        if mark is not None:
            raise UserError(f"{str(out)!r} holds an interrupted run. Continue it with --resume, or use another --out.")
        # what a run leaves that is killed before it writes run.json
        left = {state / ".run.json.tmp"} | ({state} if state.is_dir() else set())
        if {*out.glob("*"), *state.glob("*")} - left:
            raise other
        return
    if mark is None and not any(state.glob("*.safetensors")):
        raise UserError(f"there is nothing to resume in {str(out)!r}. Run without --resume.")
    lost = [state / "run.json"]
    if mark is not None and isinstance(saved := mark.pop("saved", None), list):
        check_key(f"the run in {str(out)!r}", mark, {"made by": MADE_BY, **key})
        lost = [file for name in STATES if name in saved and not (file := state / f"{name}.safetensors").exists()]
    if lost:
        raise UserError(
            f"the state {str(lost[0])!r} is missing or damaged. Put it back, or start again with another --out."
        )


def _begin(out: Path, resume: bool, console: Any) -> None:
    """Keep the results of an earlier run under another name."""
    if _paths.mark(out / "metrics.json", MADE_BY) is None:
        return
    _clean(out / "state")  # a kill may have come before it
    if resume:
        raise UserError(f"there is nothing to resume in {str(out)!r}: that run is finished.")
    kept = next(p for n in range(1, 10**6) if not (p := out.with_name(f"{out.name}.{n}")).exists())
    out.rename(kept)
    console.print(f"The earlier results are kept in {plain(kept)}.")


def _clean(state: Path) -> None:
    """Remove the states of a finished run, and last the file that says whose they are."""
    if _paths.mark(state / "run.json", MADE_BY) is None:
        return
    for file in (*state.glob("*.safetensors"), *state.glob(".*.tmp"), state / "run.json"):
        remove(file)
    with contextlib.suppress(OSError):  # somebody else's file in it stays
        state.rmdir()


def load_base(classes: int) -> tuple[Any, Any]:
    """Load the packaged base model and its scheduler.

    Args:
        classes: how many classes the data has. If they are not emoji's nine, the embedding of the classes is made anew,
            all of them starting as "no condition".

    Returns:
        a UNet2DModel in float32 whose last class index is "no condition", and a DDIMScheduler.

    Raises:
        UserError: the packaged files are missing or damaged.
    """
    from diffusers import DDIMScheduler, UNet2DModel

    with resources.as_file(resources.files("perceptual_diffusion") / "assets/base") as folder:
        try:
            model = UNet2DModel.from_pretrained(
                folder,
                torch_dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,  # needs accelerate, and a warning says so
            )
            scheduler = DDIMScheduler.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # safetensors, JSON and diffusers each have their own
            raise UserError(
                f"the packaged base model in {str(folder)!r} cannot be read: {error}. Install the package again."
            ) from error
    if model.class_embedding.num_embeddings != classes + 1:
        null = model.class_embedding.weight[-1:].detach()
        model.class_embedding = torch.nn.Embedding.from_pretrained(null.repeat(classes + 1, 1), freeze=False)
        model.register_to_config(num_class_embeds=classes + 1)
    return model, scheduler


class _Demo:
    def __init__(
        self,
        settings: Settings,
        split: datasets.Split,
        device: torch.device,
        out: Path,
        key: dict[str, Any],
        stop: Stop,
        console: Any,
    ) -> None:
        self.settings, self.device, self.out, self.key = settings, device, out, key
        self.stop, self.console = stop, console
        self.train, self.unreadable = split.train, split.unreadable
        self.packaged = settings.dataset == "emoji"
        self.state = out / "state"
        self.start = time.monotonic()

    def run(self) -> None:
        self.console.print(
            f"{self.train.name}: {len(self.train)} training pictures of {len(self.train.classes)} classes; {self.device}, "
            f"{torch.get_num_threads()} threads"
        )
        if self.unreadable:
            self.console.print(f"{self.unreadable} files could not be read as pictures and are left out.")
        base = self._base()
        tuned, flops, steps, histories = self._fine_tune(base)
        models = {"base": base, "guidance": base, "mse": tuned["mse"], "self-perceptual": tuned["self-perceptual"]}
        made = {name: self._sample(name, model) for name, model in models.items()}
        pictures = {name: datasets.to_images(latents) for name, latents in made.items()}
        rows = self._measure(pictures, flops, steps)
        self._write(models, pictures, rows, flops, steps, histories)

    def _fresh(self) -> Any:
        model, self.scheduler = load_base(len(self.train.classes))
        return model.to(self.device)

    def _tuning(self, model: Any, loss: Any) -> FineTuning:
        options = OBJECTIVE if loss == "self-perceptual" else {}
        return FineTuning(
            model, self.scheduler, self.train, loss=loss, seed=self.settings.seed, batch=BATCH, lr=LR, options=options
        )

    def _base(self) -> Any:
        model = self._fresh()
        if self.packaged:
            return model.eval()
        return self._train("base by mse", self._tuning(model, "mse"), BASE_STEPS, "base")

    def _fine_tune(
        self, base: Any
    ) -> tuple[dict[str, Any], dict[str, int], dict[str, int], dict[str, list[dict[str, float]]]]:
        weights = base.state_dict()
        tunings = {}
        for loss in ("self-perceptual", "mse"):
            model = self._fresh()
            model.load_state_dict(weights)
            tunings[loss] = self._tuning(model, loss)
        flops = {loss: tuning.count_flops() for loss, tuning in tunings.items()}
        steps = {"self-perceptual": self.settings.steps}
        steps["mse"] = max(1, round(self.settings.steps * flops["self-perceptual"] / flops["mse"]))
        tuned, histories = {}, {}
        for loss, tuning in tunings.items():
            torch.manual_seed(self.settings.seed)  # the same dropout for both
            tuned[loss] = self._train(f"tuning by {loss}", tuning, steps[loss], loss)
            histories[loss] = tuning.history
        return tuned, flops, steps, histories

    def _train(self, title: str, tuning: FineTuning, steps: int, name: str) -> Any:
        with self._progress() as bar:
            task = bar.add_task(title, total=steps, info="")

            def show(step: int, row: dict[str, float]) -> None:
                recent = tuning.history[-20:]
                means = {k: sum(r[k] for r in recent) / len(recent) for k in row}
                bar.update(task, completed=step, info="  ".join(f"L_{k} {v:.4f}" for k, v in means.items()))

            return tuning.run(
                steps,
                state=self.state / f"{name}.safetensors",
                stop=self.stop,
                key={**self.key, "run": name},
                progress=show,
                saved=lambda: self._note(name),
            )

    def _note(self, name: str) -> None:
        """Write down that a state exists: from now on it is a fault if it does not."""
        mark = _paths.mark(self.state / "run.json", MADE_BY) or {}
        if name not in mark.get("saved", ()):
            mark["saved"] = [*mark.get("saved", ()), name]
            write(self.state / "run.json", json.dumps(mark, indent=1))

    def _progress(self) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}"),
            console=self.console,
        )

    def _noise(self) -> tuple[Tensor, Tensor]:
        """The same noise for every model, and classes in the proportion of the training set."""
        n = self.settings.samples
        index = (torch.arange(n) * len(self.train) / n).long()
        labels = self.train.labels.sort().values[index]
        generator = torch.Generator().manual_seed(self.settings.seed)
        noise = torch.randn(n, 12, 16, 16, generator=generator)
        return noise.to(self.device), labels.to(self.device)

    def _sample(self, name: str, model: Any) -> Tensor:
        path, key = self.state / f"samples-{name}.safetensors", {**self.key, "run": name}
        noise, labels = self._noise()
        if path.exists():
            tensors, meta = load_state(path)
            check_key(f"the state {str(path)!r}", meta.get("key"), key)
            kept = tensors.get("samples", noise[:0])
            if (kept.shape, kept.dtype) != (noise.shape, noise.dtype):
                raise UserError(f"the state {str(path)!r} does not fit this run: its samples are {kept.dtype} of shape {tuple(kept.shape)}. Delete its folder and start again.")  # fmt: skip
            return kept
        guidance = GUIDANCE if name == "guidance" else 1.0
        with self._progress() as bar:
            task = bar.add_task(f"sampling {name}", total=len(noise), info="")

            def show(count: int) -> None:
                bar.advance(task, count)
                self.stop.check()

            made = sampling.sample(
                model,
                self.scheduler,
                noise,
                labels,
                steps=SAMPLING_STEPS,
                guidance=guidance,
                null=len(self.train.classes),
                batch=48,
                progress=show,
            ).cpu()
        save_state(path, {"samples": made}, {"key": key})
        self._note(f"samples-{name}")
        return made

    def _measure(
        self, pictures: dict[str, Tensor], flops: dict[str, int], steps: dict[str, int]
    ) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.settings.seed)
        order = torch.randperm(len(self.train), generator=generator)[:2048]  # on two cores 40 s
        self.real_n = min(self.settings.samples, len(order) // 2)
        with self.console.status(f"measuring in the features of {metrics.NETWORK}"):
            network = metrics.Network().to(self.device)
            known = metrics.features(network, self.train.images[order])
            self.stop.check()
            apart, reference = known[: self.real_n], known[self.real_n :]
            rows = []
            if len(apart) >= 2:
                rows.append(
                    {
                        "model": "real",
                        "label": "real pictures",
                        "n": len(apart),
                        "passes": 0,
                        "tflop": 0.0,
                        **metrics.compare(reference, apart),
                    }
                )
                rows[0]["nearest"] = float(
                    metrics.nearest(
                        self.train.images[order[self.real_n :]], self.train.images[order[: self.real_n]]
                    ).mean()
                )
            seen = {}
            for name, images in pictures.items():
                seen[name] = metrics.features(network, images)
                row = metrics.compare(reference, seen[name])
                self.stop.check()
                rows.append(
                    {
                        "model": name,
                        "label": LABELS[name],
                        **row,
                        "nearest": float(metrics.nearest(self.train.images, images).mean()),
                        "n": len(images),
                        "passes": 2 if name == "guidance" else 1,
                        "tflop": flops.get(name, 0) * steps.get(name, 0) / 1e12,
                    }
                )
            difference = metrics.kid_difference(reference, seen["self-perceptual"], seen["mse"])
            self.differences = {f"KID-{metrics.NETWORK}": difference}
        return rows

    def _write(
        self,
        models: dict[str, Any],
        pictures: dict[str, Tensor],
        rows: list[dict[str, Any]],
        flops: dict[str, int],
        steps: dict[str, int],
        histories: dict[str, list[dict[str, float]]],
    ) -> None:
        noise, labels = self._noise()
        shown = self._shown(labels.cpu())
        images = {f"samples-{name}.png": report.png(made[shown], COLUMNS) for name, made in pictures.items()}
        grids = {LABELS[name]: f"samples-{name}.png" for name in pictures}
        few = shown[:: max(1, len(shown) // 3)][:2].to(self.device)
        paths = {
            LABELS[n]: sampling.trajectory(models[n], self.scheduler, noise[few], labels[few], steps=SAMPLING_STEPS)
            for n in ("base", "mse", "self-perceptual")
        }
        images["trajectory.png"] = report.trajectory_png(
            {n: clean.cpu() for n, (clean, _) in paths.items()}, next(iter(paths.values()))[1]
        )
        images["loss.png"] = report.loss_png(histories, flops)
        images["comparison.png"] = report.comparison({caption: images[name] for caption, name in grids.items()})
        facts = {
            "made by": MADE_BY,
            "verdict": report.verdict(rows, METRICS, self.differences),
            "rows": rows,
            "difference to mse and its standard error": self.differences,
            "network": f"{metrics.NETWORK} (EfficientNet-Lite0, ImageNet; pictures at {metrics.RESOLUTION} px)",
            "settings": asdict(self.settings),
            "objective": OBJECTIVE,
            "mse_steps": steps["mse"],
            "base_steps": 0 if self.packaged else BASE_STEPS,
            "batch": BATCH,
            "lr": LR,
            "cost_ratio": flops["self-perceptual"] / flops["mse"],
            "pictures": len(self.train),
            "real_n": self.real_n,
            "sampling": {"scheduler": "DDIM, trailing", "steps": SAMPLING_STEPS, "guidance": GUIDANCE},
            "hardware": torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {
                "perceptual-diffusion": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "version": __version__,
            "date": datetime.now(UTC).date().isoformat(),
            "seconds": round(time.monotonic() - self.start),
        }
        for name, data in images.items():
            write(self.out / name, data)
        self.stop.check()
        write_folder(self.out / "model", lambda folder: self._save_model(models["self-perceptual"], folder))
        write(self.out / "report.html", report.page(facts, images, grids, METRICS))
        write(self.out / "metrics.json", json.dumps(facts, indent=1) + "\n")
        _clean(self.state)
        self._print(facts)

    def _save_model(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        self.scheduler.save_pretrained(folder)
        folder.chmod(0o755)
        for file in folder.iterdir():
            file.chmod(0o644)

    def _shown(self, labels: Tensor) -> Tensor:
        """Positions of the first samples of each class, at most nine classes."""
        rows = [(labels == c).nonzero()[:COLUMNS, 0] for c in labels.unique()[:9]]
        full = [row for row in rows if len(row) == COLUMNS]
        return torch.cat(full) if full else torch.arange(min(len(labels), COLUMNS * 9))

    def _print(self, facts: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(
            "samples of", *METRICS, "nearest", "passes", title=f"N = {facts['settings']['samples']}, lower is better"
        )
        for row in facts["rows"]:
            table.add_row(
                row["label"],
                *(report.cell(row, m) for m in METRICS),
                f"{row['nearest']:.3f}",
                str(row["passes"] or "–"),
            )
        console = Console(markup=False)
        console.print(table)
        for sentence in facts["verdict"]:
            console.print(sentence, highlight=False)
        console.print(f"{plain(self.out / 'report.html')}: open it in a browser", highlight=False)
        console.print(f"{plain(self.out / 'model')}: UNet2DModel.from_pretrained loads it", highlight=False)
        console.print(f"{plain(self.out)}: pictures, metrics.json; {facts['seconds']} s", highlight=False)
