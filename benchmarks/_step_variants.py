"""The steps that `step_cost.py` compares: MSE, Algorithm 1 as printed, and the objective in each of its modes."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _step_count import Parts, Step, parts
from _step_models import Batch, Case, batch, build
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

from perceptual_diffusion import PAPER, SelfPerceptualObjective, adapters, staged, taps
from perceptual_diffusion._shapes import WAYS
from perceptual_diffusion.lora import LoraTeacher
from perceptual_diffusion.teachers import CopyTeacher

LORA = LoraConfig(r=16, target_modules=r".*(to_q|to_k|to_v|to_out\.0)")


@dataclass(kw_only=True)
class Study:
    """A model under study, as it is trained.

    Attributes:
        case: what it is.
        model: the student.
        mode: the mode its tensors are made in.
        layer: the name of its middle.
        plain: an objective whose teacher is never run; it knows how the family is called.
        fake: whether nothing is run.
    """

    case: Case
    model: nn.Module
    mode: Any
    layer: str
    plain: SelfPerceptualObjective
    fake: bool

    def batch(self, size: int, resolution: int | None = None) -> Batch:
        """Draw a batch."""
        return batch(self.case, self.mode, size, resolution)

    def predict(self, given: Batch) -> tuple[Tensor, Tensor]:
        """Run the student: x_t and its prediction."""
        x_t = self.plain.add_noise(given.clean, given.noise, given.t)
        return x_t, self.plain.output(self.plain.call(self.model, x_t, given.t, given.cond), given.clean)

    def mse(self, prediction: Tensor, given: Batch) -> Tensor:
        """The usual loss."""
        return F.mse_loss(prediction.float(), self.plain.target(given.clean, given.noise, given.t).float())

    def forget(self) -> None:
        """Drop the gradients."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def parts(self, given: Batch) -> Parts:
        """Count the parts of the limit."""
        x_t = self.plain.add_noise(given.clean, given.noise, given.t_prime)
        call = self.plain.call
        return parts(self.model, self.layer, x_t, lambda x: call(self.model, x, given.t_prime, given.cond))


def study(case: Case, *, fake: bool, lora: bool = False) -> Study:
    """Build the model of a case, with LoRA layers and all else frozen if asked."""
    names = []

    def alter(model: nn.Module) -> None:
        names.extend(adapters.find(model).layers)
        if lora:
            inject_adapter_in_model(LORA, model.requires_grad_(False))

    model, mode = build(case, fake=fake, alter=alter)
    layer = names[0]
    plain = SelfPerceptualObjective.wrap(
        model, case.schedule, prediction=case.prediction, layers=layer, teacher=lambda x, t, cond: [], **PAPER
    )
    return Study(case=case, model=model, mode=mode, layer=layer, plain=plain, fake=fake)


Variant = Callable[[Study, Batch], Step]


def mse(study: Study, given: Batch) -> Step:
    """The MSE step that everything is compared with."""

    def run() -> None:
        study.forget()
        study.mse(study.predict(given)[1], given).backward()

    return Step(run=run)


def renoised(study: Study, given: Batch) -> tuple[Tensor, Tensor]:
    """The student's prediction and the true pair, both noised to t', by the formulas of the paper."""
    (alpha, sigma), (alpha_tt, sigma_tt) = (
        [s.float().view(-1, *[1] * (given.clean.ndim - 1)) for s in study.case.schedule(t)]
        for t in (given.t, given.t_prime)
    )
    x_t, prediction = study.predict(given)
    if study.case.flow:
        clean_hat, noise_hat = x_t - sigma * prediction, x_t + alpha * prediction
    else:
        clean_hat, noise_hat = alpha * x_t - sigma * prediction, sigma * x_t + alpha * prediction
    return alpha_tt * clean_hat + sigma_tt * noise_hat, alpha_tt * given.clean + sigma_tt * given.noise


def printed(study: Study, given: Batch, *, frozen: bool = True) -> Step:
    """Algorithm 1 word by word: a full copy, two full forwards, hooks that store the middle."""
    copied = copy.deepcopy(study.model).eval().requires_grad_(not frozen)
    layer = copied.get_submodule(study.layer)

    def feature(sample: Tensor) -> Tensor:
        stored: list[Tensor] = []
        handle = layer.register_forward_hook(
            lambda module, args, kwargs, out: stored.append(taps.select(out, args, kwargs)), with_kwargs=True
        )
        study.plain.call(copied, sample, given.t_prime, given.cond)
        handle.remove()
        return stored[0]

    def run() -> None:
        study.forget()
        copied.zero_grad()
        predicted, true = renoised(study, given)
        goal = feature(true)
        F.mse_loss(feature(predicted), goal).backward()

    return Step(run=run, held=[copied])


class _Enough(Exception):
    """The layer has run."""


def bare(study: Study, given: Batch) -> Step:
    """The MSE step and the limit's three passes with a hook that stops, and nothing else: what the limit takes in time."""
    copied = copy.deepcopy(study.model).eval().requires_grad_(False)
    stored: list[Tensor] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        stored.append(taps.select(out, args, kwargs))
        raise _Enough

    copied.get_submodule(study.layer).register_forward_hook(stop, with_kwargs=True)
    usual = mse(study, given)

    def forward(sample: Tensor) -> Tensor:
        with suppress(_Enough):
            study.plain.call(copied, sample, given.t_prime, given.cond)
        return stored.pop()

    def run() -> None:
        usual.run()
        with torch.no_grad():
            forward(given.noise)
        sample = given.clean.detach().requires_grad_()
        torch.autograd.grad(forward(sample).sum(), sample)

    return Step(run=run, held=[copied])


def ours(study: Study, given: Batch, *, micro_batch: Any = "auto", lora: bool = False, **options: Any) -> Step:
    """The objective, after its first pass.

    Args:
        study: the model.
        given: the batch.
        micro_batch: as in `SelfPerceptualObjective`, or "all" for the whole batch at once.
        lora: the base under the LoRA layers is the teacher; else a copy.
        options: for the teacher.
    """
    case, make = study.case, LoraTeacher if lora else CopyTeacher
    select = taps.select if study.fake else adapters.find(study.model).select  # values that do not exist tell nothing
    teacher = make(study.model, layers=[study.layer], call=study.plain.call, select=select, **options)
    objective = SelfPerceptualObjective.wrap(
        study.model, case.schedule, prediction=case.prediction, layers=study.layer, **PAPER,
        teacher=teacher, micro_batch=len(given.clean) if micro_batch == "all" else micro_batch,
    )  # fmt: skip
    if study.fake and objective.micro_batches is not None:
        objective.micro_batches = _Trusting(objective.micro_batches.size)

    def run(given: Batch = given) -> None:
        study.forget()
        loss = objective(study.model, given.clean, cond=given.cond, noise=given.noise, t=given.t, t_prime=given.t_prime)
        loss.backward()

    # the first pass cuts the copy, and looks at how many samples fit
    run(study.batch(1) if study.fake and micro_batch != "auto" else given)
    return Step(run=run, held=[teacher.module])


OURS: dict[str, Variant] = {
    "plain autograd": partial(ours, micro_batch=None),
    "two-stage": partial(ours, micro_batch="all"),
    "micro-batches of 2": partial(ours, micro_batch=2),
    "micro-batches of 1": partial(ours, micro_batch=1),
    "micro_batch auto": ours,
    "bf16 teacher": partial(ours, micro_batch=1, dtype=torch.bfloat16),
}
COUNTED: dict[str, Variant] = {
    "MSE": mse,
    "as printed": printed,
    "as printed, not frozen": partial(printed, frozen=False),
} | OURS
WALL = COUNTED | {"the limit's passes": bare, "compiled teacher": partial(ours, micro_batch="all", compile=True)}
LORA_COUNTED: dict[str, Variant] = {
    "MSE": mse,
    "as printed": printed,
    "teacher copy": partial(ours, micro_batch=1),
    "teacher lora": partial(ours, micro_batch=1, lora=True),
}


class _Trusting(staged.MicroBatches):
    """Splits the batch without comparing what the parts give, which on fake tensors cannot be compared."""

    def _way(self, *args: Any) -> str:
        return WAYS[0]


@contextmanager
def memory(size: int) -> Iterator[None]:
    """Let the device have `size` bytes, so that what "auto" chooses does not depend on where the benchmark is run."""
    found, staged._memory = staged._memory, lambda device: size
    try:
        yield
    finally:
        staged._memory = found
