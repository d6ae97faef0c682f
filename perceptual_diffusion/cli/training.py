"""Fine-tune a model with the objective or with MSE: resumable to the bit on a CPU, with averaged weights."""

import copy
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from perceptual_diffusion import SelfPerceptualObjective
from perceptual_diffusion.cli import datasets
from perceptual_diffusion.cli._errors import UserError
from perceptual_diffusion.cli.files import check_key, load_optimizer, load_state, optimizer_tensors, part, save_state

Loss = Literal["self-perceptual", "mse"]


class Interrupted(Exception):
    """The user asked to stop; the state has been saved."""


class Stop:
    """Ctrl-C or SIGTERM asks to stop at the next safe moment; a second one stops at once."""

    asked = False

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Handle the signals while the block runs."""

        def ask(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self.asked:
            raise Interrupted


class FineTuning:
    """One fine-tuning: the same batches and labels for every loss of one seed.

    Args:
        model: the student, changed in place.
        scheduler: a diffusers scheduler.
        data: the training pictures.
        loss: "self-perceptual" or "mse".
        seed: of batches, noise and dropout.
        batch: batch size.
        lr: learning rate of AdamW.
        decay: decay of the averaged weights.
        factor: what the learning rate is multiplied by at a step, from 0; by default it rises over 20 steps.
        clip: the norm that gradients are clipped to.
        drop: for what share of the samples the class is left out.
        own_average: whether the averaged model is the teacher, and so changes with the student.
        options: more arguments of `SelfPerceptualObjective.wrap`.
    """

    def __init__(
        self,
        model: Any,
        scheduler: Any,
        data: datasets.Pictures,
        *,
        loss: Loss,
        seed: int,
        batch: int = 32,
        lr: float = 1e-4,
        decay: float = 0.98,
        factor: Callable[[int], float] = lambda step: min(1.0, (step + 1) / 20),
        clip: float = 1.0,
        drop: float = 0.1,
        own_average: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.data, self.loss_name, self.batch, self.lr = model.train(), data, loss, batch, lr
        self.device = next(model.parameters()).device
        self.images, self.labels = data.images.to(self.device), data.labels.to(self.device)
        self.mirror = data.mirror.to(self.device)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        given = (options or {}) | ({"teacher": self.average.module} if own_average else {})
        self.objective = SelfPerceptualObjective.wrap(model, scheduler, seed=seed, **given)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.draws = torch.Generator(self.device).manual_seed(seed + 1)  # of t and noise; t' has the objective's own
        self.factor, self.clip, self.drop = factor, clip, drop
        self.seed, self.done = seed, 0
        self.history: list[dict[str, float]] = []
        torch.manual_seed(seed)  # dropout

    def _batch(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.randint(0, len(self.images), (self.batch,), device=self.device, generator=generator)
        chance = torch.rand(2, self.batch, device=self.device, generator=generator)
        flip = self.mirror[index] & (chance[0] < 0.5)
        images = self.images[index]
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        null = len(self.data.classes)
        return datasets.to_model(images), {"class_labels": torch.where(chance[1] < self.drop, null, self.labels[index])}

    def _loss(self, clean: Tensor, cond: dict[str, Tensor], draws: torch.Generator) -> Tensor:
        objective = self.objective
        t = objective.t(objective.schedule, clean, t=None, generator=draws)
        noise = torch.randn(clean.shape, device=clean.device, generator=draws)
        if self.loss_name == "self-perceptual":
            return objective(self.model, clean, cond=cond, t=t, noise=noise)
        output = objective.output(objective.call(self.model, objective.add_noise(clean, noise, t), t, cond), clean)
        loss: Tensor = (cast(Tensor, output) - cast(Tensor, objective.target(clean, noise, t))).square().mean()
        objective.terms = {"mse": loss.detach()[None]}
        return loss

    def step(self) -> dict[str, float]:
        """Make one step and return its losses, named "sp" and "mse"."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.factor(self.done)
        loss = self._loss(*self._batch(self.generator), self.draws)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        if not bool(norm.isfinite()):
            raise UserError(f"the gradient of step {self.done + 1} is not finite. Use a smaller learning rate.")
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.done += 1
        row = {name: float(value.mean()) for name, value in self.objective.terms.items()}
        self.history.append(row)
        return row

    def count_flops(self) -> int:
        """Count the floating-point operations of one step's forward and backward; the run is left as it was."""
        before = self.objective.rng_state()
        with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):
            for _ in range(2):  # in its first pass the objective looks around
                probe = torch.Generator(self.device).manual_seed(0)
                with FlopCounterMode(display=False) as counter:
                    self._loss(*self._batch(probe), probe).backward()
        self.objective.set_rng_state(before, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        return int(counter.get_total_flops())

    def run(
        self,
        steps: int,
        *,
        state: Path,
        stop: Stop,
        key: dict[str, Any],
        every: int = 50,
        progress: Callable[[int, dict[str, float]], None] | None = None,
        saved: Callable[[], None] = lambda: None,
    ) -> Any:
        """Train to `steps`, saving the state on the way, and return the averaged model.

        Args:
            steps: the step to reach.
            state: file of the state; if it exists the run goes on from it.
            stop: asked between steps.
            key: what the run depends on; a state with another key is refused.
            every: steps between two saved states.
            progress: called with the step and its losses.
            saved: called after each state is saved.

        Raises:
            Interrupted: a stop was asked for; the state is saved.
            UserError: the state is damaged or belongs to another run.
        """
        if state.exists():
            self._load(state, key)
        if progress is not None and self.done:
            progress(self.done, self.history[-1])
        while self.done < steps:
            row = self.step()
            if progress is not None:
                progress(self.done, row)
            if stop.asked or self.done % every == 0 or self.done == steps:
                self._save(state, key)
                saved()
            stop.check()
        averaged = copy.deepcopy(self.average.module)
        for parameter, trained in zip(averaged.parameters(), self.model.parameters(), strict=True):
            parameter.requires_grad_(trained.requires_grad)  # a teacher's are frozen
        return averaged.eval()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer)
        tensors["rng.batches"] = self.generator.get_state()
        tensors["rng.draws"] = self.draws.get_state()
        t_prime = self.objective.rng_state()
        if t_prime is not None:
            tensors["rng.t_prime"] = t_prime
        tensors["rng.torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors

    def _save(self, path: Path, key: dict[str, Any]) -> None:
        save_state(path, self._tensors(), {"key": key, "done": self.done, "history": self.history})

    def _load(self, path: Path, key: dict[str, Any]) -> None:
        tensors, meta = load_state(path)
        check_key(f"the state {str(path)!r}", meta.get("key"), key)
        try:
            self.model.load_state_dict(part(tensors, "model"))
            self.average.load_state_dict(part(tensors, "average"))
            load_optimizer(self.optimizer, tensors, self.model.parameters())
            self.generator.set_state(tensors["rng.batches"])
            self.draws.set_state(tensors["rng.draws"])
            if "rng.t_prime" in tensors or self.loss_name == "self-perceptual":
                self.objective.set_rng_state(tensors["rng.t_prime"], self.device)
            torch.set_rng_state(tensors["rng.torch"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
            self.done, self.history = int(meta["done"]), [{k: float(v) for k, v in r.items()} for r in meta["history"]]
            if not 0 < self.done == len(self.history) or len(set(map(tuple, self.history))) != 1:
                raise ValueError("the count of steps and the history differ")
        except (KeyError, AttributeError, ArithmeticError, TypeError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the state {str(path)!r} does not fit this run: {error}. Delete its folder and start again."
            ) from error
