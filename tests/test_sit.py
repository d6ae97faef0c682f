"""A DiT and a SiT written with timm's layers wrap in one line: a learned variance is cropped, data at t = 1 is said."""

import pytest
import torch
from algorithm1 import algorithm1, freeze
from diffusers import DDPMScheduler
from models import distance
from paper import PaperObjective
from timm_models import dit, sit
from torch import nn

from perceptual_diffusion import schedules
from perceptual_diffusion.adapters import find
from perceptual_diffusion.adapters._registry import without_variance

# diffusers 0.42 turns torch tensors to numpy the old way under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

CLOSE = 1e-4
LABELS = {"y": torch.tensor([1, 5, 10])}


def table(t):
    bar = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = (1 - bar).cumprod(0)[t]
    return bar.sqrt(), (1 - bar).sqrt()


CASES = {
    "DiT": (
        dit, lambda model, **more: PaperObjective.wrap(model, DDPMScheduler(), **more), table,
        torch.tensor([[20, 500, 980], [400, 30, 700]]), {"kind": "epsilon"},
    ),
    "SiT": (
        sit,
        lambda model, **more: PaperObjective.wrap(
            model, schedules.Linear(reverse=True), prediction="-flow_prediction", **more
        ),
        lambda t: (t, 1 - t), torch.tensor([[0.05, 0.5, 0.9], [0.7, 0.2, 0.4]]),
        {"kind": "flow_prediction", "velocity": (1.0, -1.0)},
    ),
}  # fmt: skip


def run(model, x, t, cond):
    return model(x, t, **cond)


@pytest.mark.parametrize("formulation", ["joint", "split"])
@pytest.mark.parametrize(("make", "wrap", "scales", "times", "kind"), CASES.values(), ids=CASES)
def test_a_transformer_of_timms_layers_wraps_in_one_line_and_equals_algorithm_1(
    make, wrap, scales, times, kind, formulation
):
    student = make()
    frozen, (t, t_prime) = freeze(student), times
    objective = wrap(student, formulation=formulation)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    clean, noise = torch.randn(2, 3, 4, 8, 8)
    loss = objective(student, clean, noise=noise, t=t, t_prime=t_prime, cond=LABELS, reduction="none")
    alpha, sigma = (s.float().view(-1, 1, 1, 1) for s in scales(t))
    prediction = student(alpha * clean + sigma * noise, t, **LABELS)[:, :4]
    expected = algorithm1(
        frozen, ["blocks.2"], run, LABELS, clean=clean, noise=noise, model_output=prediction, t_prime=t_prime,
        at_t=scales(t), at_t_prime=scales(t_prime), formulation=formulation, **kind,
    )  # fmt: skip
    assert distance(loss, expected) < CLOSE
    weights = list(student.parameters())
    one, other = (torch.autograd.grad(x.sum(), weights, allow_unused=True) for x in (loss, expected))
    assert [g is None for g in one] == [g is None for g in other]
    one, other = (torch.cat([g.flatten() for g in grads if g is not None]) for grads in (one, other))
    assert distance(one, other) < CLOSE


def test_the_loss_of_an_output_with_its_variance_is_that_of_the_output_without():
    student = dit()
    objective = PaperObjective.wrap(student, DDPMScheduler())
    clean, noise = torch.randn(2, 3, 4, 8, 8)
    t, t_prime = CASES["DiT"][3]
    output = student(clean, t, **LABELS).detach().requires_grad_()
    batch = {"clean": clean, "noise": noise, "t": t, "t_prime": t_prime, "cond": LABELS}
    whole, half = objective.loss(output, **batch), objective.loss(output[:, :4], **batch)
    assert torch.equal(whole, half)
    (gradient,) = torch.autograd.grad(whole, output)
    assert gradient[:, :4].any()
    assert not gradient[:, 4:].any()


def test_a_perfect_prediction_of_data_minus_noise_has_no_loss():
    """And one of noise - data has: the sign is the prediction's, the direction the schedule's."""
    objective = CASES["SiT"][1](sit())
    clean, noise = torch.randn(2, 3, 4, 8, 8)
    t, t_prime = CASES["SiT"][3]
    batch = {"clean": clean, "noise": noise, "t": t, "t_prime": t_prime, "cond": LABELS}
    assert float(objective.loss(clean - noise, **batch)) == 0
    assert float(objective.loss(noise - clean, **batch)) > 1e-4


class Doubled(nn.Module):
    """Gives its input and a variance, twice as wide along one dimension."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x, t):
        for block in self.blocks:
            x = x + block(x)
        return torch.cat([x, x + 1], self.dim)


SHAPES = {"vectors": ((2, 4), 1), "tokens": ((2, 6, 4), 2), "maps": ((2, 3, 6, 4), 1), "volumes": ((2, 3, 5, 6, 4), 1)}


@pytest.mark.parametrize(("shape", "dim"), SHAPES.values(), ids=SHAPES)
def test_the_first_half_of_twice_the_channels_is_the_prediction_of_an_unknown_model(shape, dim):
    model, x = Doubled(dim), torch.randn(shape)
    output = model(x, torch.zeros(2))
    assert torch.equal(find(model).output(output, x), output.narrow(dim, 0, shape[dim]))
    assert torch.equal(find(model).output((output, None), x), output.narrow(dim, 0, shape[dim]))
    objective = PaperObjective.wrap(model, schedules.Linear(), prediction="flow_prediction")
    assert objective(model, x).requires_grad


OTHERS = {
    "as wide": (2, 3, 6, 4), "three times as wide": (2, 9, 6, 4), "one channel more": (2, 4, 6, 4),
    "twice as high": (2, 3, 12, 4), "twice the batch": (4, 3, 6, 4), "twice as wide and as high": (2, 6, 12, 4),
    "another rank": (2, 6, 24),
}  # fmt: skip


@pytest.mark.parametrize("shape", OTHERS.values(), ids=OTHERS)
def test_nothing_else_is_cropped(shape):
    output = torch.randn(shape)
    assert without_variance(output, torch.randn(2, 3, 6, 4)) is output


def test_a_sequence_of_twice_the_tokens_is_not_cropped():
    """Which half of it would be the sample's cannot be told."""
    output = torch.randn(2, 12, 4)
    assert without_variance(output, torch.randn(2, 6, 4)) is output
