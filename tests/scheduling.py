"""What the tests of scheduler readings share: schedulers of diffusers, and x_t and targets as a reading has them."""

import diffusers
import diffusers.schedulers
import pytest
import torch

from perceptual_diffusion import parameterizations
from perceptual_diffusion.parameterizations import System, mix, recover

FLOAT64, FLOAT32 = 1e-12, 1e-5
"""Relative error of a scheduler that computes in the sample's float64, and of one that keeps its sigmas in float32."""


def make(name, **config):
    """A scheduler of diffusers; the test is skipped where this version has none of that class."""
    cls = getattr(diffusers.schedulers, f"{name}Scheduler", None)
    if cls is None or type(cls).__name__ == "DummyObject":
        pytest.skip(f"no {name}Scheduler in diffusers {diffusers.__version__}, or it needs a package that is not here")
    return cls(**config)


def batch(count=6):
    """A clean sample and a noise, of shape (count, 2, 3)."""
    return torch.randn(count, 2, 3, dtype=torch.float64), torch.randn(count, 2, 3, dtype=torch.float64)


def ours(process, clean, noise, t):
    """x_t of a reading."""
    return mix(clean, noise, *process.schedule(t))


def target(process, clean, noise, t):
    """What a perfect model gives, of a reading."""
    return mix(clean, noise, *parameterizations.get(process.prediction).row(process.schedule, t))


def clean_hat(process, x_t, output, t):
    """The clean sample that a reading finds in any output."""
    return recover(x_t, output, System.of(process.schedule, parameterizations.get(process.prediction), t))[0]


def near(actual, expected, tolerance):
    """Assert that the largest error is small against the largest value."""
    assert actual.shape == expected.shape
    assert float((actual.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())
