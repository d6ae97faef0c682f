"""The teacher's gradient taken in the forward: the same gradient as plain autograd, in parts of any size, in every model."""

import copy
import logging

import pytest
import torch
from algorithm1 import freeze
from paper import PaperObjective
from test_conformance import NAMES, Case
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from zoo.nested import leaves, mapped

from perceptual_diffusion import schedules, staged
from perceptual_diffusion.teachers import CopyTeacher

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
    return model, (lambda **more: PaperObjective.wrap(model, schedules.Linear(), **options | more)), given


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
        objective = case.wrap(micro_batch=micro_batch)
        losses = objective.loss(held, clean=case.clean, reduction="none", **case.given)
        (losses * WEIGHTS[: len(losses)]).sum().backward()
        found[micro_batch] = torch.cat([leaf.grad.flatten() for leaf in leaves(held)])
    assert found[None].norm() > 0
    assert apart(found[size], found[None]) < 1e-5
    assert list(objective.micro_batches._ways.values()) == [OTHER_WAYS.get(name, "first")]


OTHER_WAYS = {"UNetMotionModel": "multiple", "HiDreamImageTransformer2DModel": "anywhere"}
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
    assert counted.sizes == [(n, grad) for n in parts for grad in (False, True)]


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
        held = objective.micro_batches._saved * 90  # of a sample's numbers
        assert max(saved[memory]) == max(1, min(B, int(memory // staged.SHARE / held)))
    assert saved[64] == [1] * B
    assert saved[2**40] == [B]


def test_other_lengths_of_a_condition_are_not_tried_again_and_one_as_long_as_the_batch_is(caplog):
    _model, wrap, given = setting()
    objective = wrap(micro_batch=1)
    for length in (5, 6, 7, 9, B):  # the last may be taken for samples
        given["cond"] = {"table": torch.randn(length, 6, 5)}
        prediction = torch.randn(B, 3, 6, 5)
        expected = gradients(wrap(micro_batch=None), given, prediction)[1]
        assert apart(gradients(objective, given, prediction)[1], expected) < 1e-6
    assert list(objective.micro_batches._ways.values()) == ["first", None]
    assert "is not split" in caplog.text


def test_auto_measures_once():
    _model, wrap, given = setting()
    counted = Counted(freeze(_model))
    objective = wrap(teacher=counted.teach)
    sizes = []
    for width in (5, 6, 7):
        more = {name: torch.randn(B, 3, 6, width) for name in ("clean", "noise")}
        counted.sizes.clear()
        objective.loss(torch.randn(B, 3, 6, width, requires_grad=True), **given | more)
        sizes.append([n for n, _ in counted.sizes])
    assert sizes == [[1, B, B], [B, B], [B, B]]


def test_what_is_measured_is_what_the_graph_keeps():
    model, _, given = setting()
    teacher = CopyTeacher(model, layers=["middle"], call=lambda m, x, t, c: m(x, t, **c))
    x = torch.randn(B, 3, 6, 5)
    first, again = (staged.MicroBatches("auto")._saved_by_one(teacher, x, given["t"], {}) for _ in range(2))
    assert first == again  # the first pass of a copy looks around before
    floats = (
        3 * 30 + 8 * 30 + 8 * 30 + 8 * 30 + 2 * 2
    )  # what enters the convolution, the norm (and its statistics), tanh's result, the last layer
    assert first == pytest.approx(4 * floats, rel=0.5)


def test_out_of_memory_is_not_taken_for_a_condition_that_cannot_be_split():
    def teacher(x, t, cond):
        if len(x) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return [x]

    _model, wrap, given = setting(teacher=teacher)
    for size in (1, "auto"):
        with pytest.raises(torch.OutOfMemoryError):
            wrap(micro_batch=size).loss(torch.randn(B, 3, 6, 5, requires_grad=True), **given)


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


def nodes(value):
    todo, found = [value.grad_fn], []
    while todo:
        node = todo.pop()
        if node is not None:
            found.append(node)
            todo.extend(following for following, _ in node.next_functions)
    return found


def graph(value):
    return [node.name() for node in nodes(value)]


class Doubled(torch.autograd.Function):
    """What a kernel of one's own is to autograd."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_a_feature_that_a_function_of_python_gives_has_its_gradient():
    _model, wrap, given = setting()
    prediction = torch.randn(B, 3, 6, 5)

    def teacher(x, t, cond):
        return [Doubled.apply(torch.tanh(x))]

    losses, gradient = gradients(wrap(teacher=teacher, micro_batch=2), given, prediction)
    plain, expected = gradients(wrap(teacher=teacher, micro_batch=None), given, prediction)
    torch.testing.assert_close(losses, plain)
    assert apart(gradient, expected) < 1e-6


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


# --- what only plain autograd does right --------------------------------------------------------------------------------


class Learned(nn.Module):
    """A distance with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, f, g):
        return (self.scale[:, None, None] * (f - g)).square().flatten(1).mean(1)


def across(f, g):
    """Each sample's error beside the mean of the batch's."""
    error = (f - g).square().flatten(1).mean(1)
    return error / error.mean()


def of_the_condition(frozen):
    return lambda x, t, cond: [
        frozen.middle(torch.tanh(frozen.first(x)) + frozen.embed(cond["text"])[:, :, None, None])
    ]


@pytest.mark.parametrize("case", ["a distance that learns", "a distance across samples", "a condition that learns"])
def test_auto_leaves_it_to_plain_autograd_and_a_number_is_refused(case):
    model, wrap, given = setting(weight="min_snr")
    text = torch.randn(B, 5)
    options = {
        "a distance that learns": lambda: {"distance": Learned()},
        "a distance across samples": lambda: {"distance": across},
        "a condition that learns": lambda: {"teacher": of_the_condition(freeze(model))},
    }[case]
    found = {}
    for size in (None, "auto"):
        more = options()
        learned = text.clone().requires_grad_(case == "a condition that learns")
        held = torch.randn(B, 3, 6, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
        wrap(micro_batch=size, **more).loss(held, **given | {"cond": {"text": learned}}).backward()
        others = [learned.grad] if learned.requires_grad else []
        others += [p.grad for p in more["distance"].parameters()] if case == "a distance that learns" else []
        assert all(grad.abs().sum() > 0 for grad in others)
        found[size] = torch.cat([grad.flatten() for grad in (held.grad, *others)])
    assert apart(found["auto"], found[None]) < 1e-6
    with pytest.raises(ValueError, match=r"`micro_batch` is 2, but .*`micro_batch=None`"):
        wrap(micro_batch=2, **options()).loss(held, **given | {"cond": {"text": learned}})


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_teacher_with_reentrant_checkpoints_gets_plain_autograd_and_writes_no_gradient_of_its_own():
    model, wrap, given = setting()
    net, found = copy.deepcopy(model), {}

    def teacher(x, t, cond):
        return [checkpoint(lambda h: net.middle(torch.tanh(net.norm(net.first(h)))), x, use_reentrant=True)]

    for size in (None, "auto"):
        net.zero_grad()
        held = torch.randn(B, 3, 6, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
        loss = wrap(micro_batch=size, teacher=teacher).loss(held, **given)
        assert all(p.grad is None for p in net.parameters())
        loss.backward()
        found[size] = held.grad
    assert apart(found["auto"], found[None]) < 1e-6
    with pytest.raises(ValueError, match="use_reentrant"):
        wrap(micro_batch=1, teacher=teacher).loss(held, **given)


def test_the_backward_frees_what_the_loss_held():
    _model, wrap, given = setting()
    loss = wrap().loss(torch.randn(B, 3, 6, 5, requires_grad=True), **given)
    known = next(node for node in nodes(loss) if "Known" in node.name())
    assert sum(x.numel() for x in known.saved_tensors) == B * 90
    loss.backward()
    with pytest.raises(RuntimeError, match="already been freed"):
        _ = known.saved_tensors
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_operations_of_the_loss_are_counted_by_torchs_own_counter():
    _model, wrap, given = setting()
    objective = wrap(micro_batch=2)
    held = torch.randn(B, 3, 6, 5, requires_grad=True)
    objective.loss(held, **given)
    with FlopCounterMode(display=False) as counter:
        objective.loss(held, **given).backward()
    # convolutions of 8 channels at 30 places: two forwards of both, and the input's gradient of both
    first, middle = 2 * 30 * 9 * 3 * 8, 2 * 30 * 9 * 8 * 8
    assert counter.get_total_flops() == 3 * B * (first + middle)


def beside_others(f, g):
    """A distance that holds each sample against the others."""
    apart = (f - g).square().flatten(1).mean(1)
    return apart * (1 + apart.sum())


@pytest.mark.parametrize("broken", [[0], [0, 1, 2, 3]], ids=["the first sample", "all samples"])
def test_a_distance_that_mixes_samples_is_found_also_where_the_first_call_has_nan(broken):
    _model, wrap, given = setting(distance=beside_others)
    clean = given["clean"].clone()
    clean[broken] = torch.nan
    auto, two = wrap(), wrap(micro_batch=2)
    prediction = torch.randn(B, 3, 6, 5)
    gradients(auto, given | {"clean": clean}, prediction)
    if len(broken) == B:
        gradients(two, given | {"clean": clean}, prediction)
    with pytest.raises(ValueError, match="`distance` compares samples with each other"):
        gradients(two, given, prediction)
    _, gradient = gradients(auto, given, prediction)
    assert auto.micro_batches.plain
    assert torch.equal(gradient, gradients(wrap(micro_batch=None), given, prediction)[1])


def test_a_distance_that_compares_each_sample_by_itself_is_looked_at_until_one_is_finite():
    calls = []

    def counted(f, g):
        calls.append(len(f))
        return (f - g).square().flatten(1).mean(1)

    _model, wrap, given = setting(distance=counted)
    objective, prediction = wrap(), torch.randn(B, 3, 6, 5)
    found = []
    for data in (given | {"clean": given["clean"] * torch.nan}, given, given):
        gradients(objective, data, prediction)
        found.append(list(calls))
        calls.clear()
    assert found == [[B], [B, 1, 2], [B]]
