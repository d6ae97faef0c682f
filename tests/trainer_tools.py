"""What the tests of examples/trainers share: Algorithm 1 on normalised features, patched stand-ins, fixed t'."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from algorithm1 import algorithm1
from diffusers import DDPMScheduler
from models import distance

from perceptual_diffusion import SelfPerceptualObjective

ROOT = Path(__file__).parents[1]
PLUGINS, STANDINS = ROOT / "examples" / "trainers", Path(__file__).parent / "trainers"
CLOSE = 1e-3
TABLE = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


@pytest.fixture
def plugins(monkeypatch):
    """Let the plug-ins be imported by name, and forget afterwards what was imported from them and the stand-ins."""
    monkeypatch.syspath_prepend(PLUGINS)
    before = set(sys.modules)
    yield
    AcceleratorState._reset_state(True)  # the next trainer's precision may be another
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith((str(PLUGINS), str(STANDINS))):
            del sys.modules[name]


@pytest.fixture
def t_primes(plugins, monkeypatch):
    """Fix the t' of every loss, four samples at most. Everything else is the trainer's and the plug-in's."""
    given, loss = SimpleNamespace(t_prime=torch.tensor([30, 850, 400, 600])), SelfPerceptualObjective.loss

    def fixed(self, model_pred, **named):
        return loss(self, model_pred, t_prime=given.t_prime[: len(named["t"])], **named)

    monkeypatch.setattr(SelfPerceptualObjective, "loss", fixed)
    return given


def scales(t):
    return TABLE[t].sqrt(), (1 - TABLE[t]).sqrt()


def scheduler(**config):
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **config)


def call_model(model, x_t, t, cond):
    return model(x_t, t, **cond)


def sp(
    frozen, output, *, clean, noise, t, t_prime, cond, kind="epsilon", scales=scales, layer="mid_block", call=call_model, **more
):  # fmt: skip
    """L_sp of each sample by Algorithm 1, on normalised features."""
    return algorithm1(
        frozen, [layer], call, cond, clean=clean, noise=noise, model_output=output, t_prime=t_prime[: len(clean)],
        at_t=scales(t), at_t_prime=scales(t_prime[: len(clean)]), kind=kind, distance="normalised", **more,
    )  # fmt: skip


def flat(grads):
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


def same_gradient(loss, expected, weights, actual=None):
    """Assert that a loss is what is expected, and so its gradient; `actual` where the backward has been run already."""
    weights = [weight for weight in weights if weight.requires_grad]
    if actual is None:
        actual = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    wanted = torch.autograd.grad(expected, weights, allow_unused=True, retain_graph=True)
    assert distance(loss, expected) < CLOSE
    assert distance(flat(actual), flat(wanted)) < CLOSE


def patched(tmp_path, patch, standin, place):
    """Apply a patch to a copy of a stand-in, as a user applies it to the script; give its `main`."""
    target = tmp_path / place
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(STANDINS / standin, target)
    subprocess.run(["git", "apply", str(PLUGINS / patch)], cwd=tmp_path, check=True, capture_output=True)
    return runpy.run_path(str(target))["main"]
