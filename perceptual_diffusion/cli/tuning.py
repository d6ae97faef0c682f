"""The loop of `perceptual-diffusion train`: inputs, steps, averaged weights, and a state that goes on to the bit on a CPU."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from perceptual_diffusion import Monitor
from perceptual_diffusion.checks import SetupError
from perceptual_diffusion.cli._errors import UserError
from perceptual_diffusion.cli.batches import Order, Pictures, collate, stream
from perceptual_diffusion.cli.captions import Captions
from perceptual_diffusion.cli.config import Config
from perceptual_diffusion.cli.files import (
    check_key,
    digest,
    load_optimizer,
    load_state,
    optimizer_tensors,
    part,
    save_state,
)
from perceptual_diffusion.cli.folders import Folder
from perceptual_diffusion.cli.pipelines import Batch, Pipeline
from perceptual_diffusion.cli.student import wrap

MADE_BY = "perceptual-diffusion train"
TIMES = 16
"""At so many times a schedule is told from another."""
SKIPS = 20
"""After so many steps in a row without a finite gradient, a run in float16 is stopped."""


class Tuning:
    """One fine-tuning of a pipeline's denoiser.

    Args:
        config: what was asked for.
        loaded: the pipeline.
        folder: the data.
        accelerator: accelerate's.
    """

    def __init__(self, config: Config, loaded: Pipeline, folder: Folder, accelerator: Any) -> None:
        self.config, self.loaded, self.folder, self.accelerator = config, loaded, folder, accelerator
        training, device = config.training, accelerator.device
        self.labels, self.side = loaded.labels(folder.classes), loaded.side(training.resolution)
        self.pictures = Pictures(folder.items, self.side, loaded.channels)
        self.made_of = _digests(loaded)
        for module in (loaded.denoiser, loaded.vae, *loaded.encoders):
            if module is not None:
                module.to(device)
        with torch.no_grad():
            texts = [item.text for item in folder.items]
            self.captions = Captions(loaded, texts, training.batch) if loaded.wanted == "captions" else None
        self.objective = wrap(config, loaded)
        self.monitor = Monitor(self.objective)
        self.names, self.trained = zip(
            *((n, p) for n, p in loaded.denoiser.named_parameters() if p.requires_grad), strict=True
        )
        self.average = AveragedModel(nn.ParameterList(self.trained), multi_avg_fn=get_ema_multi_avg_fn(training.ema))
        optimizer = torch.optim.AdamW(self.trained, lr=training.lr, weight_decay=0.0)
        self.model, self.optimizer = accelerator.prepare(loaded.denoiser, optimizer)
        self.draws = torch.Generator().manual_seed((training.seed << 32) + 1 + accelerator.process_index)
        torch.manual_seed((training.seed << 32) + 1 + accelerator.process_index)  # dropout
        self.done = self.skipped = 0
        self.last: tuple[Tensor, dict[str, Any]] | None = None

    def inputs(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Turn pictures into the clean sample and the condition; draws which conditions are left out."""
        device = self.accelerator.device
        left_out = (torch.rand(len(batch.index), generator=self.draws) < self.config.training.drop).tolist()
        items = [self.folder.items[index] for index in batch.index.tolist()]
        rows: dict[str, Tensor] = {}
        if self.captions is not None:
            rows = self.captions.rows([item.text for item in items], left_out, device)
        elif self.labels:
            labels = [-1 if out else self.labels[item.label] for item, out in zip(items, left_out, strict=True)]
            rows = {"class_labels": torch.tensor(labels, device=device)}
        with torch.no_grad():
            clean = self.loaded.clean(batch.pixels.to(device), self.draws)
        return clean, self.loaded.cond(rows, batch.frames.to(device), clean)

    def example(self) -> tuple[Tensor, dict[str, Any]]:
        """Give the first batch, without an effect on the run."""
        state = self.draws.get_state()
        indices = next(iter(self._order()))
        given = self.inputs(collate([self.pictures[index] for index in indices]))
        self.draws.set_state(state)
        return given

    def check(self) -> list[str]:
        """Try a step, and give the warnings.

        Raises:
            UserError: the set-up is wrong.
        """
        clean, cond = self.example()
        try:
            with self.accelerator.autocast():
                return list(self.objective.check(self.model, clean, cond=cond).warnings)
        except SetupError as error:
            raise UserError(str(error)) from error

    def batches(self) -> Iterator[Batch]:
        """Give the batches from the step that has been reached."""
        return stream(self.pictures, self._order(), self.config.training.workers)

    def _order(self) -> Order:
        training, accelerator = self.config.training, self.accelerator
        return Order(
            len(self.pictures),
            training.batch,
            seed=training.seed,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            start=self.done * training.accumulate,
        )

    def step(self, batches: Iterator[Batch]) -> None:
        """Make one step of the optimizer."""
        training, accelerator = self.config.training, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = training.lr * min(1.0, (self.done + 1) / max(1, training.warmup))
        for _ in range(training.accumulate):
            self.last = clean, cond = self.inputs(_next(batches))
            with accelerator.accumulate(self.model):
                try:
                    with accelerator.autocast():
                        loss = self.objective(self.model, clean, cond=cond)
                except (ValueError, TypeError) as error:  # of the objective: a sentence that says what to do
                    raise UserError(str(error)) from error
                self.monitor.update()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.trained, training.clip)
                    if accelerator.scaler is None and not bool(norm.isfinite()):
                        raise UserError(f"the gradient of step {self.done + 1} is not finite. Use a smaller `lr`.")
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.skipped = self.skipped + 1 if accelerator.optimizer_step_was_skipped else 0
        if self.skipped == SKIPS:
            raise UserError(
                f'the gradients of {SKIPS} steps were not finite. Use a smaller `lr`, or `precision` = "bf16".'
            )
        self.average.update_parameters(nn.ParameterList(self.trained))
        self.done += 1

    def scalars(self) -> dict[str, float]:
        """Give what is logged: the means since the last time, the sizes of the features, the learning rate."""
        with self.accelerator.autocast():
            features = self.monitor.features(self.last[0], cond=self.last[1]) if self.last else {}
        return {**self.monitor.pop(), **features, "lr": float(self.optimizer.param_groups[0]["lr"])}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the model its averaged weights while the block runs."""
        kept = [parameter.detach().clone() for parameter in self.trained]
        self._set(self.average.module)
        self.loaded.denoiser.eval()
        try:
            yield
        finally:
            self._set(kept)
            self.loaded.denoiser.train()

    @torch.no_grad()
    def _set(self, values: Any) -> None:
        for parameter, value in zip(self.trained, values, strict=True):
            parameter.copy_(value)

    def key(self) -> dict[str, Any]:
        """What the numbers of a run depend on, beside its length."""
        free = {"steps", "workers", "log_every", "sample_every", "checkpoint_every"}
        training = {name: value for name, value in vars(self.config.training).items() if name not in free}
        objective = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self.config.objective).items()}
        data, root = hashlib.sha256(repr(self.folder.classes).encode()), Path(self.config.data)
        for item in self.folder.items:
            data.update(repr((item.path.relative_to(root).as_posix(), item.digest, item.text, item.label)).encode())
        schedule = self.objective.schedule
        scales = schedule(schedule.grid()[torch.linspace(0, len(schedule.grid()) - 1, TIMES).long()])
        return {
            **self.made_of,
            "data": data.hexdigest(),
            "schedule": [f"{x:.4g}" for scale in scales for x in scale.tolist()],  # the same on all processors
            "prediction": self.objective.prediction.name,
            "times": repr(self.objective.t),
            **training,
            **objective,
            "processes": self.accelerator.num_processes,
            "device": self.accelerator.device.type,
        }

    def _streams(self) -> list[Tensor]:
        """The states of this process' random streams."""
        t_prime = self.objective.rng_state()
        states = [self.draws.get_state(), torch.get_rng_state(), torch.empty(0) if t_prime is None else t_prime]
        device = self.accelerator.device
        return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states

    def save(self, path: Path) -> None:
        """Save all that the run goes on from; every process must call."""
        streams = torch.cat(self._streams()).to(self.accelerator.device)
        everyones = self.accelerator.gather(streams[None]).cpu()
        if self.accelerator.is_main_process:
            tensors = {f"model.{name}": value for name, value in zip(self.names, self.trained, strict=True)}
            tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
            tensors |= optimizer_tensors(self.optimizer)
            scaler, monitor = self.accelerator.scaler, self.monitor
            if monitor._sums is not None:  # what the next row of the log is a mean of
                tensors["monitor"] = monitor._sums
            meta = {
                "made by": MADE_BY, "key": self.key(), "done": self.done,
                "scaler": None if scaler is None else scaler.state_dict(), "monitor": monitor._names,
            }  # fmt: skip
            save_state(path, tensors | {"streams": everyones}, meta)
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            UserError: it is damaged, or another run's.
        """
        tensors, meta = load_state(path)
        check_key(f"the state {str(path)!r}", meta.get("key"), self.key())
        try:
            weights = part(tensors, "model")
            self._set([_like(weights[n], p) for n, p in zip(self.names, self.trained, strict=True)])
            self.average.load_state_dict(part(tensors, "average"))
            load_optimizer(self.optimizer, tensors, self.trained)
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(meta["scaler"])
            self._set_streams(tensors["streams"][self.accelerator.process_index])
            if self.accelerator.is_main_process:  # the log is its own
                monitor, sums = self.monitor, tensors.get("monitor")
                monitor._names, monitor._sums = tuple(meta.get("monitor", ())), sums
                if sums is not None and sums.shape != (monitor.bands, 1 + len(monitor._names)):
                    raise ValueError("its sums for the log have another shape")
            self.done = int(meta["done"])
            if self.done < 1:
                raise ValueError("it is of no step")
        except (KeyError, AttributeError, ArithmeticError, IndexError, TypeError, RuntimeError, ValueError) as error:
            raise UserError(f"the state {str(path)!r} does not fit this run: {error}. Start again with another `out`.") from error  # fmt: skip

    def _set_streams(self, states: Tensor) -> None:
        device, cuda = self.accelerator.device, self.accelerator.device.type == "cuda"
        of_device = torch.Generator(device).get_state().numel()
        sizes = [
            self.draws.get_state().numel(),
            torch.get_rng_state().numel(),
            of_device,
            *([of_device] if cuda else []),
        ]
        own, everywhere, t_prime, *rest = states.split(sizes)
        self.draws.set_state(own.clone())
        torch.set_rng_state(everywhere.clone())
        self.objective.set_rng_state(t_prime.clone(), device)
        if cuda:
            torch.cuda.set_rng_state(rest[0].clone(), device)


def _digests(loaded: Pipeline) -> dict[str, str]:
    """Digests of what is trained, which the teacher is made of, and of what makes its inputs; a folder may be moved."""
    vae, encoders = loaded.vae, {str(n): part for n, part in enumerate(loaded.encoders)}
    parts = loaded.pipeline.components.items()
    words = [sorted(part.get_vocab().items()) for name, part in parts if name.startswith("tokenizer") and part]
    scale = vae and (vae.config.scaling_factor, vae.config.get("shift_factor"))
    return {
        "model": digest(loaded.denoiser.state_dict()),
        "vae": digest(vae.state_dict() if vae else {}, repr(scale)),
        "text encoders": digest(nn.ModuleDict(encoders).state_dict(), repr(words)),
    }


def _next(batches: Iterator[Batch]) -> Batch:
    try:
        return next(batches)
    except UserError as error:  # of a process that reads pictures, with its traceback in the message
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    if value.shape != parameter.shape:
        raise ValueError(f"a weight has the shape {tuple(value.shape)}, expected {tuple(parameter.shape)}")
    return value
