"""DiT and SiT get Algorithm 1's gradient beside their own, on stand-ins with their interfaces."""

import importlib
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import timm_models
import torch
import trainer_tools
from algorithm1 import freeze
from diffusers import AutoencoderKL
from torch.nn.functional import mse_loss
from trainer_tools import STANDINS, patched, same_gradient, sp

plugins, t_primes = trainer_tools.plugins, trainer_tools.t_primes
# diffusers 0.42 turns torch tensors to numpy the old way under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def vae():
    return AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, sample_size=16, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


@pytest.fixture
def research(plugins, tmp_path, monkeypatch):
    """Run a patched train.py of DiT or SiT on a tiny model; `watch` gets its locals and what the model was given."""

    def run(name, model, watch, **args):
        monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda path: vae())
        held = SimpleNamespace(DiT_models={"tiny": lambda: model}, SiT_models={"tiny": lambda: model})
        monkeypatch.setitem(sys.modules, "models", held)
        monkeypatch.setitem(sys.modules, "download", SimpleNamespace(find_model=lambda path: None))
        monkeypatch.syspath_prepend(STANDINS / name)
        given = {}
        model.register_forward_pre_hook(lambda module, inputs: given.update(x_t=inputs[0], t=inputs[1]))
        loader = [(torch.randn(4, 3, 16, 16), torch.tensor([0, 3, 5, 9])) for _ in range(3)]
        main = patched(tmp_path, f"{name}.patch", f"{name}/train.py", "train.py")
        main(
            Namespace(
                model="tiny",
                vae="ema",
                ckpt=None,
                lr=1e-2,
                loader=loader,
                watch=lambda now: watch(now, **given),
                **args,
            )
        )

    return run


def test_patched_dit_adds_algorithm_1_of_the_epsilon_half_to_its_mse_and_variance_bound(research, t_primes):
    model = timm_models.dit()
    frozen, steps = freeze(model), []
    bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)

    def linear(t):
        return bar[t].sqrt(), (1 - bar[t]).sqrt()

    def watch(now, x_t, t):
        alpha, sigma = (scale.float().view(-1, 1, 1, 1) for scale in linear(t))
        noise, cond = (x_t - alpha * now["x"]) / sigma, {"y": now["y"]}
        own = now["diffusion"].diffusion.training_losses(model, now["x"], t, cond, noise)["loss"]
        output = model(x_t, t, **cond)[:, :4]
        perceptual = sp(
            frozen, output, clean=now["x"], noise=noise, t=t, t_prime=t_primes.t_prime, cond=cond, scales=linear,
            layer="blocks.2",
        )  # fmt: skip
        same_gradient(now["loss"], (own + perceptual).mean(), model.parameters())
        steps.append(float(perceptual.detach().mean()))

    research("dit", model, watch)
    assert len(steps) == 3
    assert min(steps) > 1e-4


def test_the_variance_half_of_a_dit_keeps_the_gradient_of_its_bound_alone(plugins, monkeypatch):
    monkeypatch.syspath_prepend(STANDINS / "dit")
    plugin, diffusion = importlib.import_module("dit_loss"), importlib.import_module("diffusion").create_diffusion("")
    model, x, t, noise = (
        timm_models.dit(),
        torch.randn(3, 4, 8, 8),
        torch.tensor([10, 400, 900]),
        torch.randn(3, 4, 8, 8),
    )
    wrapped, outputs = plugin.PerceptualDiffusion(diffusion, model), []

    def watched(x_t, times, **kwargs):
        outputs.append(model(x_t, times, **kwargs).detach().requires_grad_())
        return outputs[-1]

    grads = [
        torch.autograd.grad(side.training_losses(watched, x, t, {"y": t % 10}, noise)["loss"].sum(), outputs[-1])[0]
        for side in (wrapped, diffusion)
    ]
    assert torch.equal(grads[0][:, 4:], grads[1][:, 4:])
    assert grads[1][:, 4:].any()
    assert not torch.allclose(grads[0][:, :4], grads[1][:, :4])
    assert wrapped.num_timesteps == 1000


PATHS = {
    "Linear": (lambda t: (t, 1 - t), lambda t: (torch.ones_like(t), -torch.ones_like(t))),
    "GVP": (
        lambda t: ((t * torch.pi / 2).sin(), (t * torch.pi / 2).cos()),
        lambda t: (torch.pi / 2 * (t * torch.pi / 2).cos(), -torch.pi / 2 * (t * torch.pi / 2).sin()),
    ),
}


@pytest.mark.parametrize(("path", "prediction"), [("Linear", "velocity"), ("GVP", "velocity"), ("Linear", "noise")])
def test_patched_sit_adds_algorithm_1_with_data_at_t_1_to_its_loss(research, t_primes, path, prediction):
    t_primes.t_prime = torch.tensor([0.2, 0.9, 0.5, 0.7])
    model = timm_models.sit()
    frozen, steps = freeze(model), []
    at, slopes = PATHS[path]

    def watch(now, x_t, t):
        alpha, sigma, rise, fall = (scale.view(-1, 1, 1, 1) for scale in (*at(t), *slopes(t)))
        noise, cond = (x_t - alpha * now["x"]) / sigma, {"y": now["y"]}
        output = model(x_t, t, **cond)
        velocity = prediction == "velocity"
        own = mse_loss(output, rise * now["x"] + fall * noise if velocity else noise)
        kind = {"kind": "flow_prediction", "velocity": (rise, fall)} if velocity else {}
        perceptual = sp(
            frozen, output, clean=now["x"], noise=noise, t=t, t_prime=t_primes.t_prime, cond=cond, scales=at, layer="blocks.2",
            **kind,
        )  # fmt: skip
        same_gradient(now["loss"], own + perceptual.mean(), model.parameters())
        steps.append(float(perceptual.detach().mean()))

    research("sit", model, watch, path_type=path, prediction=prediction)
    assert len(steps) == 3
    assert min(steps) > 1e-4


def test_a_path_of_sit_that_has_no_schedule_here_is_named(plugins, monkeypatch):
    monkeypatch.syspath_prepend(STANDINS / "sit")
    plugin, transport = importlib.import_module("sit_loss"), importlib.import_module("transport")
    with pytest.raises(ValueError, match="`transport` follows VPCPlan, expected one of ICPlan, GVPCPlan"):
        plugin.PerceptualTransport(transport.create_transport("VP"), timm_models.sit())
