"""The teacher's gradient taken in the forward: the same gradient as plain autograd, in parts of any size, in every model."""

import logging

import pytest
import torch
from algorithm1 import freeze
from test_conformance import NAMES, Case
from torch import nn
from zoo.nested import leaves, mapped

from perceptual_diffusion import SelfPerceptualObjective, schedules, staged

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Transformer2DModelOutput.*:FutureWarning"),
]

B = 4
WEIGHTS = torch.tensor([1.0, 3.0, 0.5, 2.0])
"""A loss that weighs samples differently: no part may take another's weight."""


class Net(nn.Module):
    """Convolutions with a condition (B, C), a table of positions that all samples share, and norms."""

    def __init__(self, **options):
        super().__init__()
        self.first, self.middle, self.last = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 3, 1),
        )
        self.norm, self.embed = nn.GroupNorm(2, 8, **options), nn.Linear(5, 8)

    def forward(self, x, t, text=None, table=None):
        hidden = self.norm(self.first(x)) + t.to(x.dtype).view(-1, 1, 1, 1)
        if text is not None:
            hidden = hidden + self.embed(text)[:, :, None, None]
        if table is not None:
            hidden = hidden * table.sum(0)
        return self.last(torch.tanh(self.middle(torch.tanh(hidden))))


def setting(model=None, *, cond=None, seed=0, **options):
    torch.manual_seed(seed)
    model = model or Net()
    options = {"prediction": "v_prediction", "layers": ["middle"]} | options
    given = {
        "clean": torch.randn(B, 3, 6, 5), "noise": torch.randn(B, 3, 6, 5), "t": torch.tensor([0.1, 0.4, 0.7, 0.9]),
        "t_prime": torch.tensor([0.6, 0.1, 0.2, 0.3]), "cond": cond or {},
    }  # fmt: skip
    return model, (lambda **more: SelfPerceptualObjective.wrap(model, schedules.Linear(), **options | more)), given


def gradients(objective, given, prediction, weights=WEIGHTS):
    held = prediction.detach().clone().requires_grad_()
    losses = objective.loss(held, reduction="none", **given)
    (losses * weights).sum().backward()
    return losses.detach(), held.grad


def apart(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, "auto"])
@pytest.mark.parametrize("formulation", ["joint", "split"])
@pytest.mark.parametrize("distance", ["mse", "mae", "normalised"])
def test_the_gradient_is_that_of_plain_autograd(size, formulation, distance):
    _model, wrap, given = setting(formulation=formulation, distance=distance, mse_weight=0.3)
    prediction = torch.randn(B, 3, 6, 5)
    losses, gradient = gradients(wrap(micro_batch=size), given, prediction)
    plain, expected = gradients(wrap(micro_batch=None), given, prediction)
    torch.testing.assert_close(losses, plain, rtol=1e-6, atol=0)
    assert apart(gradient, expected) < 1e-6


@pytest.mark.parametrize(("name", "size"), [(name, 1 + i % 2) for i, name in enumerate(NAMES)])
def test_in_every_model_of_the_zoo_parts_give_the_gradient_of_the_whole(name, size):
    if name in PACKED:
        pytest.skip("the samples lie one behind the other in its conditions; the refusal is tested below")
    case = Case(name)
    with torch.no_grad():
        x_t = case.objective.add_noise(case.clean, case.noise, case.given["t"])
        predicted = case.objective.output(
            case.objective.call(case.model, x_t, case.given["t"], case.given["cond"]), case.clean
        )
    found = {}
    for micro_batch in (None, size):
        held = mapped(lambda x: x.detach().clone().requires_grad_(), predicted)
        losses = case.wrap(micro_batch=micro_batch).loss(held, clean=case.clean, reduction="none", **case.given)
        (losses * WEIGHTS[: len(losses)]).sum().backward()
        found[micro_batch] = torch.cat([leaf.grad.flatten() for leaf in leaves(held)])
    assert found[None].norm() > 0
    assert apart(found[size], found[None]) < 1e-5


PACKED = ("Cosmos3OmniTransformer", "Cosmos3OmniTransformer.sound")


@pytest.mark.parametrize("name", PACKED)
def test_conditions_in_which_samples_are_packed_are_refused_by_hand_and_left_whole_by_auto(name, monkeypatch, caplog):
    case = Case(name)
    prediction = mapped(lambda x: torch.randn_like(x).requires_grad_(), case.clean)
    with pytest.raises(ValueError, match=r"cannot be split.*`micro_batch=None`"):
        case.wrap(micro_batch=1).loss(prediction, clean=case.clean, **case.given)
    monkeypatch.setattr(staged, "_memory", lambda device: 64)
    with caplog.at_level(logging.INFO, logger="perceptual_diffusion"):
        losses = case.wrap(micro_batch="auto").loss(prediction, clean=case.clean, reduction="none", **case.given)
    torch.testing.assert_close(
        losses, case.wrap(micro_batch=None).loss(prediction, clean=case.clean, reduction="none", **case.given)
    )
    assert "is not split" in caplog.text


# --- how a batch is split -----------------------------------------------------------------------------------------------


def test_a_condition_that_happens_to_be_as_long_as_the_batch_is_not_split():
    cond = {"text": torch.randn(B, 5), "table": torch.randn(B, 6, 5)}  # four positions, four samples
    _model, wrap, given = setting(cond=cond)
    with pytest.raises(ValueError, match=r"features change by .*%"):
        wrap(micro_batch=1).loss(torch.randn(B, 3, 6, 5, requires_grad=True), **given)
    cond["table"] = cond["table"][:3]
    prediction = torch.randn(B, 3, 6, 5)
    expected = gradients(wrap(micro_batch=None), given, prediction)[1]
    assert apart(gradients(wrap(micro_batch=1), given, prediction)[1], expected) < 1e-6


class Mixed(Net):
    """Its samples depend on each other."""

    def forward(self, x, t, **cond):
        return super().forward(x + x.mean(0, keepdim=True), t, **cond)


def test_samples_that_depend_on_each_other_are_not_split():
    model = Mixed()
    frozen = freeze(model)
    _, wrap, given = setting(model, teacher=lambda x, t, cond: [frozen(x, t, **cond)])
    with pytest.raises(ValueError, match="depend on each other"):
        wrap(micro_batch=2).loss(torch.randn(B, 3, 6, 5, requires_grad=True), **given)


class Counted(nn.Module):
    """A teacher that notes how many samples each pass has."""

    def __init__(self, net):
        super().__init__()
        self.net, self.sizes = net, []

    def teach(self, x_t, t, cond):
        self.sizes.append((len(x_t), torch.is_grad_enabled()))
        return [self.net(x_t, t, **cond)]


@pytest.mark.parametrize(("size", "parts"), [(1, [1, 1, 1, 1]), (2, [2, 2]), (3, [2, 2]), (4, [4]), (7, [4])])
def test_parts_are_as_even_as_can_be(size, parts):
    model, wrap, given = setting()
    counted = Counted(freeze(model))
    objective = wrap(micro_batch=size, teacher=counted.teach)
    for _ in range(2):
        counted.sizes.clear()
        objective.loss(torch.randn(B, 3, 6, 5, requires_grad=True), **given)
    assert counted.sizes == [(n, grad) for n in parts for grad in (True, False)]


def test_auto_splits_what_would_take_more_than_its_share_of_the_memory(monkeypatch):
    model, wrap, given = setting()
    counted = Counted(freeze(model))
    saved = {}
    for memory in (64, 32 * 2**14, 2**40):
        monkeypatch.setattr(staged, "_memory", lambda device, memory=memory: memory)
        objective = wrap(micro_batch="auto", teacher=counted.teach)
        for _ in range(2):
            counted.sizes.clear()
            objective.loss(torch.randn(B, 3, 6, 5, requires_grad=True), **given)
        saved[memory] = [n for n, grad in counted.sizes if grad]
        (held,) = objective.micro_batches._saved.values()
        assert max(saved[memory]) == max(1, min(B, memory // staged.SHARE // held))
    assert saved[64] == [1] * B
    assert saved[2**40] == [B]


def test_after_four_layouts_others_are_taken_on_trust():
    _model, wrap, given = setting()
    objective = wrap(micro_batch=1)
    for extra in range(7):
        given["cond"] = {"table": torch.randn(5 + extra, 6, 5)}
        objective.loss(torch.randn(B, 3, 6, 5, requires_grad=True), **given)
    assert len(objective.micro_batches._ways) == staged.LOOKS


@pytest.mark.parametrize("size", [0, -1, 1.5, "some", True])
def test_a_wrong_size_is_refused(size):
    _model, wrap, _given = setting()
    with pytest.raises(ValueError, match="`micro_batch` is"):
        wrap(micro_batch=size)


# --- what the student's backward does with it ---------------------------------------------------------------------------


def test_accumulated_and_repeated_backwards_add_up():
    _model, wrap, given = setting()
    objective, prediction = wrap(), torch.randn(B, 3, 6, 5, requires_grad=True)
    loss = objective.loss(prediction, **given)
    loss.backward(retain_graph=True)
    once = prediction.grad.clone()
    (2 * loss).backward()
    objective.loss(prediction, **given).backward()
    torch.testing.assert_close(prediction.grad, 4 * once)


def test_two_derivatives_are_refused_unless_autograd_is_plain():
    _model, wrap, given = setting()
    prediction = torch.randn(B, 3, 6, 5, requires_grad=True)
    with pytest.raises(ValueError, match="`micro_batch=None`"):
        torch.autograd.grad(wrap().loss(prediction, **given), prediction, create_graph=True)
    (first,) = torch.autograd.grad(wrap(micro_batch=None).loss(prediction, **given), prediction, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), prediction)
    assert second.abs().sum() > 0


def test_x_t_and_the_data_get_the_gradient_that_plain_autograd_gives_them():
    _model, wrap, given = setting()
    prediction, found = torch.randn(B, 3, 6, 5), {}
    for size in (None, 1):
        x_t = torch.randn(B, 3, 6, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()
        clean = given["clean"].clone().requires_grad_()
        wrap(micro_batch=size).loss(prediction, **given | {"clean": clean}, x_t=x_t).backward()
        found[size] = torch.cat([x_t.grad, clean.grad])
    assert apart(found[1], found[None]) < 1e-6


def test_after_the_loss_nothing_of_the_teacher_is_kept():
    _model, wrap, given = setting()
    kept = []
    prediction = torch.randn(B, 3, 6, 5, requires_grad=True)
    objective = wrap(micro_batch=2)
    objective.loss(prediction, **given)  # finds the parts first
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = objective.loss(prediction, **given)
    reached = graph(loss)
    assert not any("Convolution" in name for name in reached)
    assert any("Convolution" in name for name in graph(wrap(micro_batch=None).loss(prediction, **given)))


def graph(value):
    todo, names = [value.grad_fn], []
    while todo:
        node = todo.pop()
        if node is not None:
            names.append(node.name())
            todo.extend(following for following, _ in node.next_functions)
    return names


def test_a_distance_without_a_gradient_is_refused():
    _model, wrap, given = setting(distance=lambda f, g: (f.detach() - g).square().flatten(1).mean(1))
    with pytest.raises(ValueError, match="`distance` gives no gradient"):
        wrap().loss(torch.randn(B, 3, 6, 5, requires_grad=True), **given)


def test_under_no_grad_the_loss_is_the_same():
    _model, wrap, given = setting()
    prediction = torch.randn(B, 3, 6, 5)
    objective = wrap(micro_batch=1)
    losses, _ = gradients(objective, given, prediction)
    with torch.no_grad():
        torch.testing.assert_close(objective.loss(prediction, reduction="none", **given), losses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_backward_of_the_teacher_is_not_autocast(dtype):
    _model, wrap, given = setting()
    prediction = torch.randn(B, 3, 6, 5)
    found = {}
    for size in (None, 2):
        objective = wrap(micro_batch=size)
        held = prediction.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            loss = objective.loss(held, **given)
        loss.backward()
        found[size] = held.grad
    assert apart(found[2], found[None]) < {torch.bfloat16: 0.02, torch.float16: 0.002}[dtype]


def test_a_gradient_that_underflows_in_float16_is_scaled():
    model, wrap, given = setting()
    half = freeze(model).half()
    found = {}
    for name, teacher, size in (("half", half, "auto"), ("plain", half, None), ("single", freeze(model), "auto")):
        objective = wrap(
            teacher=lambda x, t, cond, net=teacher: [net.middle(net.norm(net.first(x.to(net.first.weight.dtype))))], micro_batch=size,
            distance=lambda f, g: 1e-5 * (f - g).square().flatten(1).mean(1),
        )  # fmt: skip
        found[name] = gradients(objective, given, torch.randn(B, 3, 6, 5, generator=torch.Generator().manual_seed(1)))[
            1
        ]
    assert apart(found["half"], found["single"]) < 0.01
    assert apart(found["plain"], found["single"]) > 0.1
