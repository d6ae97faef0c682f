"""What `check` raises and returns."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from perceptual_diffusion.types import Feature

FAULTS = {
    "clean": "the data holds NaN or infinity",
    "partitioned": "the student's weights are not whole on this process",
    "frozen": "no weight of the student is trained",
    "time": "a sampler draws wrong times, or the student is given them in a wrong unit",
    "cond": "the student does not take the condition",
    "call": "the student cannot be run",
    "shape": "the student's output is no prediction of the data",
    "output": "the student's output is not finite, or does not depend on x_t",
    "prediction": "the student's output is another kind of prediction, or its negative",
    "schedule": "the student was trained on another schedule",
    "teacher": "the teacher cannot be run",
    "tap": "the teacher gives no features",
    "truncated": "the teacher's copy needs what it no longer holds",
    "features": "a feature is not finite, all zero, or does not depend on the sample",
    "shared": "the teacher runs on weights that are trained",
    "moving": "the teacher's weights change between its forward and its backward",
    "training": "the teacher is in train mode",
    "random": "the teacher gives other features for the same sample",
    "loss": "the loss or its gradient is not finite",
    "no_gradient": "the teacher gives no gradient to the prediction",
    "unfrozen": "the teacher's weights receive a gradient",
    "gradient": "the gradient is not that of the loss",
    "untrainable": "the student's weights get no gradient",
}
"""The kinds of fault that `check` tells apart."""


class SetupError(ValueError):
    """A wrong set-up.

    Attributes:
        fault: its kind, a key of `FAULTS`.
    """

    def __init__(self, fault: str, message: str) -> None:
        super().__init__(message)
        self.fault = fault


@dataclass(frozen=True, kw_only=True)
class FeatureReport:
    """What one of the teacher's features looks like on the true pair.

    Attributes:
        name: the layer, or its place in the teacher's list.
        shape: its shape.
        mean_abs: mean of the absolute values.
        std: standard deviation.
        largest_channel: share of the largest channel in the sum of squares.
        outliers: channels whose root mean square is above 10 times the median one.
        zeros: share of values that are exactly 0.
    """

    name: str
    shape: tuple[int, ...]
    mean_abs: float
    std: float
    largest_channel: float
    outliers: int
    zeros: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `check` measured; print it.

    Attributes:
        loss: L_sp of the student's prediction.
        mse: mean squared error of the prediction.
        explained: share of the target's mean square that the prediction explains; 0 for a prediction of zero.
        skill: share that it explains of what x_t leaves open (`_checking.skill`).
        teacher_parameters: how many parameters the teacher holds.
        trained_parameters: how many parameters of the student get a gradient.
        features: one report per feature of the teacher.
        warnings: what looks odd but may be right.
    """

    loss: float
    mse: float
    explained: float
    skill: float
    teacher_parameters: int
    trained_parameters: int
    features: tuple[FeatureReport, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"loss {self.loss:.4g}, mse {self.mse:.4g}: the student explains {self.explained:.1%} of its target, and "
            f"{self.skill:.1%} of what x_t leaves open",
            f"{self.trained_parameters:,} parameters are trained, the teacher holds {self.teacher_parameters:,}",
            f"{'feature':<32} {'shape':<20} {'mean |f|':>9} {'std':>9} {'top channel':>11} {'outliers':>8} {'zeros':>6}",
        ]
        lines += [
            f"{f.name:<32} {f.shape!s:<20} {f.mean_abs:>9.3g} {f.std:>9.3g} {f.largest_channel:>11.1%} {f.outliers:>8} "
            f"{f.zeros:>6.1%}"
            for f in self.features
        ]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


@contextlib.contextmanager
def named(fault: str, what: str) -> Iterator[None]:
    """Turn whatever is raised, but a lack of memory, into a SetupError."""
    try:
        yield
    except (torch.OutOfMemoryError, SetupError):
        raise
    except Exception as error:
        fault = "gradient" if "recomputes something else" in str(error) else fault
        raise SetupError(fault, f"{what}: {type(error).__name__}: {str(error).rstrip('.')}.") from error


def describe_feature(name: str, feature: Feature) -> FeatureReport:
    """Measure a feature."""
    whole = torch.cat([part.flatten(1, -2) for part in feature], 1) if isinstance(feature, list) else feature
    wide = whole.detach().float()
    # channels lie where `distances.normalised` has them
    channels = wide.movedim(-1 if wide.ndim == 3 else 1, 0).flatten(1) if wide.ndim > 1 else wide[None]
    power = channels.square().mean(1)
    return FeatureReport(
        name=name,
        shape=tuple(whole.shape),
        mean_abs=float(wide.abs().mean()),
        std=float(wide.std(correction=0)),
        largest_channel=float(power.max() / power.sum()),
        outliers=int((power > 100 * power.median()).sum()),
        zeros=float((wide == 0).float().mean()),
    )
