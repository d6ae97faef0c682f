"""What is done about a sample whose loss or gradient is not finite: nothing, an error, or the step without it.

A NaN of one sample stays its own in the losses (B,), but not in the gradient: 0 times the NaN of its activations is NaN in the
gradient of every weight. So to leave a sample out is to make the step again of the others, with their own t, noise and t'.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from perceptual_diffusion._shapes import leaves, map_leaves, take_cond, tensors_in
from perceptual_diffusion._subset import Batch, gradients, is_sharded
from perceptual_diffusion.types import Cond, Feature, Sample, Teacher

__all__ = ["NonFiniteError", "NonFiniteWarning"]

NonFinite = Literal["propagate", "raise", "skip"]
POLICIES = ("propagate", "raise", "skip")

SHOWN = 8
"""How many samples a message names."""
INPUTS = ("`clean`", "`noise`", "`x_t`", "`cond`")
PREDICTION = "the student's prediction"


class NonFiniteError(FloatingPointError):
    """The loss of a sample, or its gradient, is NaN or infinite.

    Attributes:
        samples: where that begins, by the sample's index in the batch.
    """

    def __init__(self, message: str, samples: Mapping[int, str]) -> None:
        super().__init__(message)
        self.samples = dict(samples)


class NonFiniteWarning(UserWarning):
    """Samples were left out of a step, since their loss or gradient is NaN or infinite."""


@dataclass(kw_only=True)
class Step:
    """What came of a batch.

    Attributes:
        predicted: ŷ, (B, *) or nested, with its graph.
        x_tt: the true pair at t', likewise.
        samples: the predicted pair at t', one sample or two.
        perceptual: L_sp, shape (B,).
        mse: L_mse, shape (B,).
        losses: both as the objective weighs them, shape (B,).
    """

    predicted: Sample
    x_tt: Sample
    samples: list[Sample]
    perceptual: Tensor
    mse: Tensor
    losses: Tensor

    def bad(self) -> list[int]:
        """Say which samples have a loss, or a gradient of it to their prediction, that is not finite, by one host sync."""
        fine = self.losses.detach().isfinite()
        wanted = [leaf for leaf in leaves(self.predicted) if leaf.requires_grad]
        if self.losses.requires_grad and wanted:
            given = iter(gradients(self.losses, wanted, keep=True))
            of_each = map_leaves(lambda x: next(given) if x.requires_grad else torch.zeros_like(x), self.predicted)
            fine = fine & finite(of_each)
        return [] if bool(fine.all()) else [i for i, good in enumerate(fine.tolist()) if not good]


def finite(sample: Sample) -> Tensor:
    """Whether all numbers of each sample are finite, (B, *) or nested to (B,)."""
    if isinstance(sample, Tensor):
        fine = sample.detach().isfinite()
        return fine if fine.ndim == 1 else fine.flatten(1).all(1)
    if isinstance(sample, list):
        return torch.stack([cast(Tensor, part).detach().isfinite().all() for part in sample])
    parts = [finite(part) for part in (sample.values() if isinstance(sample, dict) else sample)]
    return torch.stack(parts).all(0)


def judge(
    policy: NonFinite, step: Step, batch: Batch, x_t: Sample, bad: list[int], teacher: Teacher, *, again: bool
) -> dict[int, str]:
    """Say which samples are left out, by their places in the batch, and where what is not finite begins.

    Args:
        policy: "raise" or "skip".
        step: what came of the batch.
        batch: the batch.
        x_t: what the student saw of it.
        bad: the places of the samples that are not finite.
        teacher: the teacher.
        again: whether the student's pass can be made again.

    Raises:
        NonFiniteError: the policy says so, or the student's pass would have to be made again.
    """
    where = trace(step, batch, x_t, bad, teacher)
    given = {i: began for i, began in where.items() if began in INPUTS}
    if policy == "skip" and (again or not (given or PREDICTION in where.values())):
        return given or where  # where samples depend on each other, the rest may be bad by those
    named = {batch.rows[i]: began for i, began in where.items()}
    told = in_words(where, batch)
    if policy == "raise":
        raise NonFiniteError(
            f"the loss or its gradient is not finite: {told}. Mend what it begins in, or wrap "
            "with `nonfinite='skip'`, which leaves such samples out.",
            named,
        )
    raise NonFiniteError(
        f"the loss is not finite: {told}. The student's pass has to be made again without, "
        "which `objective(model, clean)` does and `objective.loss` cannot: leave them out of the batch.",
        named,
    )


def warn(left_out: Mapping[int, str], batch: Batch) -> None:
    """Warn that samples of the whole batch are left out."""
    told = in_words(left_out, batch)
    warnings.warn(f"samples whose loss or gradient is not finite are left out: {told}.", NonFiniteWarning, stacklevel=4)


def trace(step: Step, batch: Batch, x_t: Sample, bad: list[int], teacher: Teacher) -> dict[int, str]:
    """Say where what is not finite begins, for each bad sample, by its index in the batch; the student saw `x_t`."""
    whole = len(batch.rows)
    fine: dict[str, Callable[[int], bool]] = {
        "`clean`": _in(finite(batch.clean)),
        "`noise`": _in(finite(batch.noise)),
        "`x_t`": _in(finite(x_t)),
        "`cond`": lambda i: not _has_nan(take_cond(batch.cond, whole, slice(i, i + 1))),
        PREDICTION: _in(finite(step.predicted)),
    }
    of_distance = step.perceptual.detach().isfinite()
    if not bool(of_distance.all()):
        fine |= _of_teacher(step, batch, teacher)
    fine["`distance`"] = _in(of_distance)
    fine["the MSE or `weight`"] = _in(step.losses.detach().isfinite())
    return {i: next((name for name, is_fine in fine.items() if not is_fine(i)), "the gradient") for i in bad}


def _of_teacher(step: Step, batch: Batch, teacher: Teacher) -> dict[str, Callable[[int], bool]]:
    """What the teacher is given, and what it gives in passes of their own."""
    samples = [map_leaves(lambda s, x: s.detach().to(x.dtype), sample, step.x_tt) for sample in step.samples]
    predicted = torch.stack([finite(sample) for sample in samples]).all(0)
    fine = {"x_t'": _in(finite(step.x_tt)), "the predicted pair at t'": _in(predicted)}
    if is_sharded(getattr(teacher, "module", None)):  # a pass of this process alone would wait for the others
        return fine
    with torch.no_grad():
        for name, given in (("true", [step.x_tt]), ("predicted", samples)):
            features = [feature for sample in given for feature in teacher(sample, batch.t_prime, batch.cond)]
            of_each = [_finite_feature(feature, len(batch.rows)) for feature in features]
            fine[f"the teacher's features of the {name} pair"] = _in(torch.stack(of_each).all(0))
    return fine


def _finite_feature(feature: Feature, batch: int) -> Tensor:
    if isinstance(feature, list):
        return finite(cast(Sample, feature))
    return feature.isfinite().reshape(batch, -1).all(1)  # also of batch · frames


def _in(fine: Tensor) -> Callable[[int], bool]:
    return cast("Callable[[int], bool]", fine.tolist().__getitem__)


def _has_nan(cond: Cond) -> bool:
    return any(bool(x.isnan().any()) for x in tensors_in(cond) if x.is_floating_point())  # masks hold infinities


def in_words(where: Mapping[int, str], batch: Batch) -> str:
    """Say which samples of a batch are bad, at which of its times, and where that begins."""
    shown = [
        f"sample {batch.rows[i]} (t = {float(batch.t[i]):g}, t' = {float(batch.t_prime[i]):g}), where it begins in {began}"
        for i, began in sorted(where.items())[:SHOWN]
    ]
    more = [f"{len(where) - SHOWN} more"] if len(where) > SHOWN else []
    return f"{len(where)} of {len(batch.rows)} samples: {'; '.join(shown + more)}"


def check_policy(policy: Any) -> NonFinite:
    """Give the policy back.

    Raises:
        ValueError: it is none.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown nonfinite {policy!r}, expected 'propagate', 'raise' or 'skip'.")
    return cast(NonFinite, policy)
