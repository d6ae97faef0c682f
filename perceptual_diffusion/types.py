"""Aliases and protocols that the package shares."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias, Union, runtime_checkable

import torch
from torch import Tensor

Sample: TypeAlias = Union[Tensor, tuple["Sample", ...], list["Sample"], dict[str, "Sample"]]  # noqa: UP007
"""What a model denoises: a tensor (B, *), a tuple or dict of such tensors denoised together, or a list of B tensors, one
per sample, for models that take samples of different sizes."""

Cond: TypeAlias = Mapping[str, Any]
"""The model's own keyword arguments that carry its condition."""

TimeFunction: TypeAlias = Callable[[Tensor], Tensor]
"""A function of time, shape (B,), to a scale, shape (B,)."""

Feature: TypeAlias = Tensor | list[Tensor]
"""A feature of a batch: (B, *), or (B k, *) with k frames; or B features (1, *) of different sizes."""

Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A distance between two features of shape (B, *), to one value per sample, shape (B,)."""

ModelOutput: TypeAlias = Callable[[Any, Sample], Sample]
"""Takes the prediction of a sample out of whatever the model returned: `(output, x_t) -> prediction`."""

FeatureSelect: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Takes the feature tensor out of a layer's output: `(output, args, kwargs) -> feature`."""


class ModelCall(Protocol):
    """Runs a model at time t, in the schedule's unit, shape (B,), and gives its raw output."""

    def __call__(self, model: Any, x_t: Any, t: Tensor, cond: Cond, /) -> Any: ...


@runtime_checkable
class Teacher(Protocol):
    """The perceptual network f*: features of a noisy sample, in the order of the layers."""

    def __call__(self, x_t: Any, t: Tensor, cond: Cond, /) -> list[Feature]: ...


class TimeSampler(Protocol):
    """Draws times for the batch of `like`, shape (B,), in the schedule's unit; `t` is the first time when t' is drawn."""

    def __call__(
        self, schedule: Any, like: Tensor, /, *, t: Tensor | None, generator: torch.Generator | None
    ) -> Tensor: ...
