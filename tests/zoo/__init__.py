"""Tiny instances of the denoisers of diffusers, one row per class, with their released conventions written by hand.

A row says independently of the package what the adapters must find out: how the model is called, in which unit it takes
its time, what it predicts, where its middle is and which part of the middle's output is the noisy sample's. Sources are
the pipelines, schedulers, conversion and training scripts of diffusers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

if tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42):
    pytest.skip("the rows are classes of diffusers 0.42", allow_module_level=True)

B = 3
"""Samples in a batch; unlike 2 it coincides with no other size of a row."""


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """One class, small.

    Attributes:
        config: what the class is built with.
        clean: the clean sample: a tensor (B, *), a list of B tensors without a batch dimension, or a dict of these by
            the name of the model's argument where several are denoised together.
        cond: the model's other keyword arguments, but the noisy sample and the time.
        middle: dotted name of the middle.
        feature: takes the noisy sample's part out of the middle's raw output: a tensor or a list of tensors, batch first.
        time: released timesteps (B,), 0 clean to 1000 noise (sigma for EDM), to the model's time arguments.
        given: what the model is given of x_t, by its arguments; `(x_t, t) -> kwargs`.
        predicted: takes the prediction out of the model's raw output, shaped like `clean`.
        prediction: "epsilon", "sample", "v_prediction", "flow_prediction" (noise - clean), "edm", or one
            of these with a leading minus.
        scheduler: builds the diffusers scheduler that the class was released with.
        t: timesteps to test at, as `time` takes them, (B,).
        awake: modules without a gradient to their input in eval mode: a frozen copy has them in train mode.
        seed: seed of the weights.
    """

    config: dict[str, Any]
    clean: Any
    cond: dict[str, Any] = field(default_factory=dict)
    middle: str
    feature: Callable[[Any], Any]
    time: Callable[[torch.Tensor], dict[str, Any]]
    given: Callable[[Any, torch.Tensor], dict[str, Any]]
    predicted: Callable[[Any], Any]
    prediction: str
    scheduler: Callable[[], Any]
    t: torch.Tensor
    awake: tuple[str, ...] = ()
    seed: int = 0


ROWS: dict[str, Callable[[], Tiny]] = {}
"""Class name to row; a name after a dot is a variant: "UNet2DConditionModel.sdxl"."""

REFUSED: dict[str, str] = {}
"""Class name to a word of the reason why it is refused."""

NO_CPU_BACKWARD: set[str] = set()
"""Rows whose attention (FlexAttention) has no backward on a CPU."""


def row(make: Callable[[], Tiny]) -> Callable[[], Tiny]:
    """Enter a row under the name of its function; `__` in it stands for the dot before a variant."""
    ROWS[make.__name__.replace("__", ".")] = make
    return make


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draw a normal tensor: the same for the same shape and seed."""
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed + sum(31**i * n for i, n in enumerate(shape)))
    )


def build(name: str) -> tuple[nn.Module, Tiny]:
    """Build the model of a row, in eval mode; no weight stays zero, so that no block is an identity."""
    import diffusers

    tiny = ROWS[name]()
    torch.manual_seed(tiny.seed)
    torch.use_deterministic_algorithms(True)  # then what the class leaves uninitialised is NaN
    try:
        model = getattr(diffusers, name.split(".")[0])(**tiny.config).eval()
    finally:
        torch.use_deterministic_algorithms(False)
    generator = torch.Generator().manual_seed(tiny.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_(0).add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, tiny


FLOW_T = torch.tensor([120.0, 480.0, 870.0])
INDEX_T = torch.tensor([120, 480, 870])
SIGMA_T = torch.tensor([0.2, 1.1, 6.0])

from zoo import audio, images, joint, unets, videos, wan  # noqa: E402, F401  (they enter their rows)
