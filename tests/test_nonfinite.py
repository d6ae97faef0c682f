"""Samples that are not finite: reported with where that begins, or left out to the bit, and nothing at all by default."""

import copy
import warnings
import weakref
from typing import NamedTuple

import pytest
import torch
from algorithm1 import freeze
from models import STREAMS, TOLERANCE, TwoStreams, distance
from paper import PaperObjective
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from perceptual_diffusion import Monitor, schedules
from perceptual_diffusion.nonfinite import NonFiniteError, NonFiniteWarning

B = 5
NAN, INF = float("nan"), float("inf")


class Net(nn.Module):
    """Convolutions with a condition (B, 5) and a table that all samples share; a dropout, and a norm of batches if wanted."""

    def __init__(self, norm=False):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8)
        self.middle, self.embed, self.drop = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(5, 8), nn.Dropout(0.2)

    def forward(self, x, t, text, table=None):
        hidden = self.norm(self.first(x)) + t.to(x.dtype).view(-1, 1, 1, 1) + self.embed(text)[:, :, None, None]
        if table is not None:
            hidden = hidden * table.sum(0)
        return self.last(torch.tanh(self.middle(self.drop(torch.tanh(hidden)))))


def setting(seed=0, norm=False, **options):
    torch.manual_seed(seed)
    model = Net(norm)
    objective = PaperObjective.wrap(
        model, schedules.Linear(), **{"prediction": "v_prediction", "layers": "middle", "seed": 3} | options
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    given = {
        "clean": torch.randn(B, 3, 6, 4), "noise": torch.randn(B, 3, 6, 4), "t": torch.linspace(0.1, 0.9, B),
        "t_prime": torch.linspace(0.8, 0.05, B), "cond": {"text": torch.randn(B, 5), "table": torch.rand(3, 6, 4)},
    }  # fmt: skip
    return model, objective, given


def part_of(given, rows):
    cond = given["cond"]
    return {name: value[rows] for name, value in given.items() if name != "cond"} | {
        "cond": cond | {"text": cond["text"][rows]}
    }


def gradient(model):
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def trained(model, objective, given, **options):
    """The loss of the step, the gradient of every weight, and the buffers after it."""
    model, seen = model.train(), torch.manual_seed(7)
    model.zero_grad()
    loss = objective(model, given["clean"], **{k: v for k, v in given.items() if k != "clean"}, **options)
    loss.sum().backward()
    return loss.detach(), gradient(model), [b.clone() for b in model.buffers()], seen.get_state()


def spoil(given, row, what="clean", value=NAN):
    tensor = given["cond"]["text"] if what == "cond" else given[what]
    tensor[row].view(-1)[1] = value


# --- "skip": the step is that of the batch without them ---------------------------------------------------------------

CASES = {
    "by default": {},
    "split": {"formulation": "split", "mse_weight": 0.3},
    "weighted": {"weight": "min_snr", "mse_weight": 1.0},
    "a function's weights": {"weight": lambda t: 1 + t},
    "one at a time": {"micro_batch": 1},
    "plain autograd": {"micro_batch": None, "distance": "normalised"},
}


@pytest.mark.parametrize("rows", [[0, 1, 3], [4], [1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_others_gradients_are_to_the_bit_those_of_the_batch_without_them(case, rows):
    model, objective, given = setting(nonfinite="skip", **CASES[case])
    plain, reference, _ = setting(**CASES[case])
    for net, loss in ((model, objective), (plain, reference)):
        trained(net, loss, given)  # where the samples lie in features is found in a first pass, on finite ones
    expected = trained(plain, reference, part_of(given, rows))
    bad = [i for i in range(B) if i not in rows]
    for row, what in zip(bad, ("clean", "cond", "noise", "clean"), strict=False):
        spoil(given, row, what)
    with pytest.warns(NonFiniteWarning, match=rf"left out: {len(bad)} of 5 samples: sample {bad[0]} \(t = "):
        found = trained(model, objective, given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert list(objective.left_out) == bad
    assert torch.equal(objective.times["t"], given["t"][rows])
    assert torch.equal(objective.terms["sp"], reference.terms["sp"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(model, objective, part_of(given, rows))
    assert objective.left_out == {}


def test_a_norm_of_batches_is_left_as_if_the_sample_had_not_been():
    """Its NaN reaches every sample of the first pass, and would stay in the buffers."""
    model, objective, given = setting(norm=True, nonfinite="skip")
    plain, reference, _ = setting(norm=True)
    rows = [0, 1, 3, 4]
    expected = trained(plain, reference, part_of(given, rows))
    spoil(given, 2)
    with pytest.warns(NonFiniteWarning, match=r"1 of 5 samples: sample 2 .* begins in `clean`"):
        found = trained(model, objective, given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len(found[2]) == 3


def test_what_the_objective_draws_is_the_others_own():
    """t, noise and t' are drawn for the whole batch: the next step draws what it would have drawn."""
    model, objective, given = setting(nonfinite="skip", t_prime="contributing")
    plain, reference, _ = setting(t_prime="contributing")
    clean, cond, rows = given["clean"], given["cond"], [0, 2, 3, 4]
    reference(plain, clean, cond=cond)
    t, t_prime = reference.times["t"], reference.times["t_prime"]
    spoil(given, 1)
    with pytest.warns(NonFiniteWarning):
        objective(model, clean, cond=cond)
    assert torch.equal(objective.times["t"], t[rows])
    assert torch.equal(objective.times["t_prime"], t_prime[rows])
    assert torch.equal(objective.rng_state(), reference.rng_state())
    torch.testing.assert_close(objective.terms["mse"].isfinite(), torch.ones(4, dtype=torch.bool))


def test_without_reduction_the_samples_left_out_have_a_loss_of_0():
    model, objective, given = setting(nonfinite="skip")
    plain, reference, _ = setting()
    rows = [0, 2, 4]
    expected = trained(plain, reference, part_of(given, rows), reduction="none")
    spoil(given, 1)
    spoil(given, 3, value=INF)
    with pytest.warns(NonFiniteWarning):
        losses, found, *_ = trained(model, objective, given, reduction="none")
    assert losses.shape == (B,)
    assert losses[[1, 3]].tolist() == [0, 0]
    assert torch.equal(losses[rows], expected[0])
    assert torch.equal(found, expected[1])


def test_the_graph_of_the_pass_in_vain_is_freed_before_the_next():
    model, objective, given = setting(nonfinite="skip")
    seen, alive = [], []

    def look(module, args, output):
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(args[0]))  # which the graph holds, for the gradient of the weight

    model.middle.register_forward_hook(look)
    spoil(given, 1)
    with pytest.warns(NonFiniteWarning):
        trained(model, objective, given)
    assert alive == [0, 0, 0, 0]  # between the two passes lie two looks at how the conditions are read


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_batch_of_bad_samples_alone_trains_nothing(reduction):
    model, objective, given = setting(nonfinite="skip")
    given["clean"][:] = NAN
    with pytest.warns(NonFiniteWarning, match="5 of 5 samples"):
        losses, found, *_ = trained(model, objective, given, reduction=reduction)
    assert not losses.any()
    assert losses.shape == ((B,) if reduction == "none" else ())
    assert found.numel() == sum(weight.numel() for weight in model.parameters())
    assert not found.any()
    assert len(objective.terms["sp"]) == len(objective.times["t"]) == 0
    assert (objective.terms.keys(), objective.times.keys()) == ({"sp", "mse"}, {"t", "t_prime"})
    monitor = Monitor(objective)
    monitor.update()
    assert monitor.pop() == {}


def test_weights_that_are_not_finite_are_not_trained_on():
    model, objective, given = setting(nonfinite="skip")
    trained(model, objective, given)
    with torch.no_grad():
        model.last.weight[0] = NAN
    with pytest.raises(ValueError, match="the weights of `model` are not finite"):
        trained(model, objective, given)


def test_conditions_that_cannot_be_told_apart_are_refused():
    """Where samples depend on each other in the teacher, no way to split the conditions fits."""
    model, _, given = setting()
    frozen = freeze(model)

    def teacher(x, t, cond):
        return [frozen(x + x.mean(0, keepdim=True), t, **cond)]

    objective = setting(teacher=teacher, nonfinite="skip")[1]
    spoil(given, 1)
    with pytest.raises(ValueError, match="`nonfinite` is 'skip', but samples cannot be left out"):
        trained(model, objective, given)


@pytest.mark.parametrize("where", ["frames", "another dimension", "lists"])
def test_conditions_are_split_wherever_the_samples_lie_in_them(where):
    """Two rows for each sample, one behind the other; or the samples in the second dimension; or a list of samples."""
    texts = torch.randn(B, 2, 5, generator=torch.Generator().manual_seed(5))
    given_as = {
        "frames": lambda x: x.flatten(0, 1), "another dimension": lambda x: x.transpose(0, 1), "lists": list
    }[where]  # fmt: skip
    taken = {
        "frames": lambda x: x.unflatten(0, (-1, 2)), "another dimension": lambda x: x.transpose(0, 1),
        "lists": torch.stack,
    }[where]  # fmt: skip

    def call(model, x, t, cond):
        return model(x, t, taken(cond["text"]).mean(1))

    losses = []
    for bad in (True, False):
        model, objective, given = setting(nonfinite="skip", call=call)
        rows = [0, 1, 2, 4]
        if bad:
            spoil(given, 3)
            given["cond"] = {"text": given_as(texts)}
            with pytest.warns(NonFiniteWarning):
                losses.append(trained(model, objective, given)[1])
        else:
            given = part_of(given, rows) | {"cond": {"text": given_as(texts[rows])}}
            losses.append(trained(model, objective, given)[1])
    assert torch.equal(*losses)


class Pair(NamedTuple):
    text: torch.Tensor
    table: torch.Tensor


NESTS = {
    "tuple": lambda *both: both,
    "list": lambda *both: [*both],
    "named tuple": Pair,
    "mapping": lambda a, b: {1: a, 2: b},
}


@pytest.mark.parametrize("nest", NESTS)
def test_conditions_inside_a_condition_are_split_and_what_all_share_stays(nest):
    kinds = set()

    def call(model, x, t, cond):
        kinds.add(type(cond["both"]))
        text, table = cond["both"].values() if nest == "mapping" else cond["both"]
        return model(x, t, text, table)

    found = []
    for bad in (True, False):
        model, objective, given = setting(nonfinite="skip", call=call)
        given = given if bad else part_of(given, [0, 1, 2, 4])
        if bad:
            spoil(given, 3)
        given["cond"] = {"both": NESTS[nest](given["cond"]["text"], given["cond"]["table"])}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", NonFiniteWarning)
            found.append(trained(model, objective, given)[1])
        assert len(told) == bad
    assert torch.equal(*found)
    assert len(kinds) == 1


@pytest.mark.parametrize("kind", ["dict", "ragged"])
def test_nested_samples_can_be_left_out(kind):
    torch.manual_seed(0)
    if kind == "dict":
        model, layers = TwoStreams(), ["see", "join"]
        clean = {"image": torch.randn(4, 3, 5, 5), "sound": torch.randn(4, 4)}
        less = {name: value[[0, 1, 3]] for name, value in clean.items()}
    else:

        class Ragged(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Conv2d(3, 3, 3, padding=1)

            def forward(self, x, t):
                return [torch.tanh(self.body(part[None]))[0] * s for part, s in zip(x, t, strict=True)]

        model, layers = Ragged(), None
        clean = [torch.randn(3, 4 + i, 5) for i in range(4)]
        less = [clean[i] for i in (0, 1, 3)]
    options = {"layers": layers} if layers else {"teacher": lambda x, t, cond: [[part[None] for part in x]]}
    found = []
    for samples in (clean, less):
        objective = PaperObjective.wrap(
            model, schedules.Linear(), prediction="v_prediction", nonfinite="skip", **options
        )
        t, t_prime = torch.tensor([0.2, 0.5, 0.6, 0.9]), torch.tensor([0.7, 0.1, 0.3, 0.4])
        noise = copy.deepcopy(samples)
        if samples is less:
            t, t_prime = t[[0, 1, 3]], t_prime[[0, 1, 3]]
        model.zero_grad()
        if samples is clean:
            (clean["sound"] if kind == "dict" else clean[2])[2 if kind == "dict" else 0].fill_(NAN)
            with pytest.warns(NonFiniteWarning, match="sample 2"):
                objective(model, samples, noise=noise, t=t, t_prime=t_prime).backward()
        else:
            objective(model, samples, noise=noise, t=t, t_prime=t_prime).backward()
        found.append(gradient(model))
    assert torch.equal(*found)


class Late(nn.Module):
    """Uses its condition behind the tapped layer only, and by way of a gate; `read` makes one row per sample of it."""

    def __init__(self, read, gate):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)
        self.embed, self.drop, self.norm = nn.Linear(5, 4), nn.Dropout(0.2), nn.BatchNorm2d(4)
        self.gate, self.read = nn.Parameter(torch.full((4, 1, 1), gate)), read

    def forward(self, x, t, text):
        hidden = self.norm(self.drop(torch.tanh(self.middle(torch.tanh(self.first(x))))))
        return self.last(torch.tanh(hidden + self.gate * self.read(self, hidden, text)[..., None, None]))


def attended(model, hidden, table):
    """Attention of each sample to all rows of a table."""
    keys = model.embed(table)
    return (hidden.mean((2, 3)) @ keys.T).softmax(1) @ keys


def summed(model, hidden, packed):
    """Sequences one behind the other, and their lengths."""
    rows, lengths = packed
    of = torch.arange(len(lengths)).repeat_interleave(lengths)
    return torch.zeros(len(lengths), 4).index_add(0, of, model.embed(rows))


TOKENS = [torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) for n in (2, 2, 3, 1, 4)]
ROWS, PAIRS = torch.stack([x[0] for x in TOKENS]), torch.randn(B, 2, 5, generator=torch.Generator().manual_seed(0))
LAYOUTS = {
    "first dimension": (lambda model, _, text: model.embed(text), lambda rows: ROWS[rows]),
    "frames": (
        lambda model, _, text: model.embed(text).unflatten(0, (-1, 2)).mean(1),
        lambda rows: PAIRS[rows].flatten(0, 1),
    ),
    "second dimension": (lambda model, _, text: model.embed(text).mean(0), lambda rows: PAIRS[rows].transpose(0, 1)),
    "list": (
        lambda model, _, text: torch.stack([model.embed(x).mean(0) for x in text]),
        lambda rows: [TOKENS[i] for i in rows],
    ),
    "a table of 2 B rows": (attended, lambda rows: PAIRS.flatten(0, 1)),
}
UNTOLD = {
    "a table of B rows": (attended, ROWS),
    "a list of B numbers": (lambda model, hidden, text: hidden.mean((2, 3)) * sum(text), [0.1, 0.2, 0.3, 0.4, 0.5]),
    "packed": (summed, (torch.cat(TOKENS), torch.tensor([len(x) for x in TOKENS]))),
    "packed, by chance k B rows": (summed, (torch.cat([*TOKENS, *TOKENS])[:15], torch.tensor([2, 2, 3, 4, 4]))),
}


def late_step(read, text, gate, teacher, rows=None, **options):
    torch.manual_seed(0)
    model = Late(read, gate)
    objective = PaperObjective.wrap(
        model,
        schedules.Linear(),
        prediction="v_prediction",
        layers="middle",
        nonfinite="skip",
        teacher=teacher,
        **options,
    )
    given = part_of(setting()[2], range(B) if rows is None else rows) | {"cond": {"text": text}}
    if rows is None:
        spoil(given, 2)
    return trained(model, objective, given)


@pytest.mark.parametrize("teacher", ["copy", lambda x, t, cond: [torch.tanh(x)]], ids=["copy", "without conditions"])
@pytest.mark.parametrize("gate", [1.0, 0.0], ids=["open", "closed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_condition_that_only_the_student_uses_is_split_as_the_student_reads_it(layout, gate, teacher):
    """Also where it does not show in the prediction yet: the gate that is closed has a gradient."""
    (read, make), rows = LAYOUTS[layout], [0, 1, 3, 4]
    expected = late_step(read, make(rows), gate, teacher, rows)
    with pytest.warns(NonFiniteWarning, match="sample 2"):
        found = late_step(read, make([*range(B)]), gate, teacher)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("teacher", ["copy", lambda x, t, cond: [torch.tanh(x)]], ids=["copy", "without conditions"])
@pytest.mark.parametrize("gate", [1.0, 0.0], ids=["open", "closed"])
@pytest.mark.parametrize("layout", UNTOLD)
def test_a_condition_whose_rows_are_nobodys_is_refused(layout, gate, teacher):
    with pytest.raises(ValueError, match=r"samples cannot be left out.*Wrap with `nonfinite='raise'`"):
        late_step(*UNTOLD[layout], gate, teacher)


@pytest.mark.parametrize("frozen", [False, True], ids=["no_grad", "frozen"])
def test_where_nothing_is_trained_conditions_are_split_by_the_prediction(frozen):
    (read, make), rows, text = LAYOUTS["frames"], [0, 1, 3, 4], [*range(B)]

    def step(rows, text, read=read):
        torch.manual_seed(0)
        model = Late(read, 1.0).requires_grad_(not frozen)
        objective = PaperObjective.wrap(
            model, schedules.Linear(), prediction="v_prediction", layers="middle", nonfinite="skip"
        )
        given = part_of(setting()[2], range(B) if rows is None else rows) | {"cond": {"text": text}}
        if rows is None:
            spoil(given, 2)
        torch.manual_seed(7)
        with torch.set_grad_enabled(frozen):
            return objective(model, **given)

    with pytest.warns(NonFiniteWarning, match="sample 2"):
        assert torch.equal(step(None, make(text)), step(rows, make(rows)))
    with pytest.raises(ValueError, match="samples cannot be left out"):
        step(None, ROWS, attended)


def test_a_condition_that_only_the_teacher_uses_is_split_as_the_teacher_reads_it():
    torch.manual_seed(0)
    model = Late(lambda model, hidden, text: hidden.mean((2, 3)), 1.0)
    scale = torch.rand(B, 2)

    def step(rows, cond, bad):
        objective = PaperObjective.wrap(
            model, schedules.Linear(), prediction="v_prediction", nonfinite="skip", call=lambda m, x, t, c: m(x, t, None),
            teacher=lambda x, t, c: [torch.tanh(x) * c["scale"].unflatten(0, (-1, 2)).mean(1).view(-1, 1, 1, 1)],
        )  # fmt: skip
        given = part_of(setting()[2], rows) | {"cond": cond}
        if bad:
            spoil(given, 1)
        model.norm.reset_running_stats()
        return trained(model, objective, given)

    rows = [0, 2, 3, 4]
    expected = step(rows, {"scale": scale[rows].flatten()}, bad=False)
    with pytest.warns(NonFiniteWarning):
        found = step([*range(B)], {"scale": scale.flatten()}, bad=True)
    assert torch.equal(found[1], expected[1])


def test_a_student_whose_gradient_cannot_be_looked_at_is_refused():
    from torch.utils.checkpoint import checkpoint

    def read(model, hidden, text):
        return checkpoint(attended, model, hidden, text, use_reentrant=True)

    with pytest.raises(ValueError, match=r"`nonfinite` looks at .*`use_reentrant=False`"):
        late_step(read, ROWS.clone(), 1.0, "copy")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_conditions_are_split_as_the_student_reads_them(dtype):
    (read, make), rows = LAYOUTS["frames"], [0, 1, 3, 4]
    with torch.autocast("cpu", dtype):
        expected = late_step(read, make(rows), 0.0, "copy", rows)
        with pytest.warns(NonFiniteWarning, match="sample 2"):
            found = late_step(read, make([*range(B)]), 0.0, "copy")
    assert torch.equal(found[1], expected[1])


def test_to_look_at_a_compiled_student_compiles_nothing_and_leaves_its_modes():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model, objective, given = setting(nonfinite="skip")
    model.train().drop.eval()
    spoil(given, 3)
    torch.compiler.reset()
    student = torch.compile(model, backend=backend, dynamic=True)
    modes = [module.training for module in student.modules()]
    with pytest.warns(NonFiniteWarning):
        objective(student, given["clean"], **{k: v for k, v in given.items() if k != "clean"}).backward()
    assert [module.training for module in student.modules()] == modes
    assert len(graphs) == 2  # of five samples and of four


class Reassigning(nn.Module):
    """Sets a new tensor in a buffer's place in every pass; and makes its table longer where that is too short."""

    def __init__(self):
        super().__init__()
        self.body, self.reach = nn.Conv2d(3, 3, 1), 2
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("table", torch.linspace(0, 1, 2))

    def forward(self, x, t):
        if x.shape[-1] > self.reach:
            self.reach = x.shape[-1]
            self.table = torch.linspace(0, 1, self.reach)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return torch.tanh(self.body(x) + self.mean) * self.table[: x.shape[-1]]


@pytest.mark.parametrize("rows", [[0, 2, 3], []], ids=["some", "none"])
@pytest.mark.parametrize("kind", ["reassigned", "norm of batches"])
def test_buffers_are_as_if_the_bad_samples_had_not_been(kind, rows):
    def student():
        torch.manual_seed(0)
        return Reassigning() if kind == "reassigned" else nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))

    model, plain = student(), student()
    objective = PaperObjective(
        schedule=schedules.Linear(), prediction="v_prediction", teacher=lambda x, t, cond: [torch.tanh(x)],
        call=(lambda m, x, t, c: m(x, t)) if kind == "reassigned" else (lambda m, x, t, c: m(x)), nonfinite="skip",
    )  # fmt: skip
    given = setting()[2] | {"cond": {}}
    if rows:
        trained(plain, objective, part_of(given | {"cond": {"text": torch.zeros(B)}}, rows) | {"cond": {}})
    for row in {*range(B)} - {*rows}:
        spoil(given, row)
    with pytest.warns(NonFiniteWarning):
        trained(model, objective, given)
    for name, buffer in plain.named_buffers():
        if name != "table":
            assert torch.equal(model.get_buffer(name), buffer)
    if kind == "reassigned":
        assert len(model.table) == model.reach == 4


def test_a_graph_of_yours_that_holds_a_buffer_of_the_student_is_left_as_it_is():
    class Scaled(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 3, 1)
            self.register_buffer("scale", torch.full((3, 1, 1), 2.0))

        def forward(self, x):
            return super().forward(x) * self.scale

    model, given = Scaled(), setting()[2]
    objective = PaperObjective(
        schedule=schedules.Linear(), prediction="v_prediction", teacher=lambda x, t, cond: [torch.tanh(x)],
        call=lambda m, x, t, c: m(x), nonfinite="skip",
    )  # fmt: skip
    other = model(given["noise"]).square().mean()
    spoil(given, 0)
    with pytest.warns(NonFiniteWarning):
        (other + objective(model, given["clean"])).backward()


def test_the_objective_may_be_called_in_the_distance_of_a_step_that_leaves_samples_out():
    depth = []

    def nested(f, g):
        if not depth:
            depth.append(1)
            objective.loss(torch.zeros(1, 3), clean=torch.zeros(1, 3), noise=torch.zeros(1, 3), t=torch.tensor([0.5]))
            depth.pop()
        return (f - g).square().flatten(1).mean(1)

    model, objective, given = setting(nonfinite="skip", distance=nested, teacher=lambda x, t, cond: [torch.tanh(x)])
    spoil(given, 1)
    with pytest.warns(NonFiniteWarning, match="1 of 5 samples: sample 1"):
        losses = trained(model, objective, given, reduction="none")[0]
    assert losses.shape == (B,)
    assert losses[1] == 0
    assert objective.left_out == {1: "`clean`"}


# --- the drop-in form -------------------------------------------------------------------------------------------------


def overflowing(row):
    """A teacher whose features of one sample are infinite: that of a first number above 100."""
    return lambda x, t, cond: [torch.where(x.flatten(1)[:, :1, None, None] > 100, INF, 1) * x.square()]


@pytest.mark.parametrize("micro_batch", [None, 1, "auto"])
def test_the_drop_in_form_leaves_out_what_begins_behind_the_prediction(micro_batch):
    found = []
    for bad in (True, False):
        model, objective, given = setting(teacher=overflowing(2), nonfinite="skip", micro_batch=micro_batch)
        rows = [0, 1, 3, 4]
        given["clean"][2].view(-1)[0] = 1e4
        given = given if bad else part_of(given, rows)
        x_t = objective.add_noise(given["clean"], given["noise"], given["t"])
        prediction = model.eval()(x_t, given["t"], **given["cond"])
        if bad:
            with pytest.warns(NonFiniteWarning, match="sample 2 .* begins in the teacher's features of the true pair"):
                loss = objective.loss(prediction, **given)
        else:
            loss = objective.loss(prediction, **given)
        loss.backward()
        found.append((loss.detach(), gradient(model)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    assert distance(found[0][1], found[1][1]) < TOLERANCE[torch.float32]


def test_the_drop_in_form_refuses_what_is_in_the_students_graph():
    model, objective, given = setting(nonfinite="skip")
    spoil(given, 3)
    prediction = model(objective.add_noise(given["clean"], given["noise"], given["t"]), given["t"], **given["cond"])
    with pytest.raises(
        NonFiniteError, match=r"pass has to be made again without.*`objective\(model, clean\)`"
    ) as caught:
        objective.loss(prediction, **given)
    assert caught.value.samples == {3: "`clean`"}


def test_the_drop_in_form_gives_0_where_all_is_bad_behind_the_prediction():
    model, objective, given = setting(teacher=lambda x, t, cond: [x * INF], nonfinite="skip")
    prediction = model(given["clean"], given["t"], **given["cond"])
    with pytest.warns(NonFiniteWarning, match="5 of 5"):
        objective.loss(prediction, **given).backward()
    assert not gradient(model).any()


# --- "raise": which, when, and where it begins ------------------------------------------------------------------------


def of_row(row, value):
    def teacher(x, t, cond):
        features = x.clone()
        return [torch.cat([features[:row], features[row : row + 1] * value, features[row + 1 :]])]

    return teacher


def rooted(f, g):
    """Its value is finite everywhere, and its slope at 0 is infinite."""
    return (f - g).flatten(1).square().sum(1).sqrt()


BEGINNINGS = {
    "`clean`": ({}, lambda given: spoil(given, 3)),
    "`noise`": ({}, lambda given: spoil(given, 3, "noise", INF)),
    "`cond`": ({}, lambda given: spoil(given, 3, "cond")),
    "the student's prediction": ({}, lambda given: given["cond"]["text"][3].fill_(INF)),  # no NaN, before it is summed
    "the teacher's features of the true pair": ({"teacher": of_row(3, INF)}, None),
    "`distance`": ({"distance": lambda f, g: (f - g).flatten(1).sum(1) * torch.tensor([1, 1, 1, NAN, 1])[: len(f)]}, None),
    "the MSE or `weight`": ({"weight": lambda t: torch.where((t - 0.7).abs() < 0.01, INF, 1.0)}, None),
    "the gradient": ({"distance": rooted}, lambda given: given["t_prime"][3].copy_(given["t"][3])),
}  # fmt: skip


@pytest.mark.parametrize("began", BEGINNINGS)
def test_the_error_says_which_sample_when_and_where_it_begins(began):
    options, change = BEGINNINGS[began]
    model, objective, given = setting(nonfinite="raise", **options)
    if change is not None:
        change(given)
    with pytest.raises(NonFiniteError, match=r"1 of 5 samples: sample 3 \(t = 0.7, t' = ") as caught:
        trained(model, objective, given)
    assert caught.value.samples == {3: began}
    assert f"begins in {began}. Mend" in str(caught.value)


BEHIND = {
    "`x_t`": lambda given, prediction: given["x_t"][3].fill_(NAN),
    "x_t'": lambda given, prediction: given["clean"][3].fill_(
        6e4
    ),  # with noise more than float16 holds, where sigma' is not 0
    "the predicted pair at t'": lambda given, prediction: prediction[3].fill_(1e6),
    "the teacher's features of the predicted pair": lambda given, prediction: prediction[3].fill_(5e3),
}


@pytest.mark.parametrize("began", BEHIND)
def test_in_float16_the_error_says_what_overflows(began):
    """Finite in float32, and beyond 65504 where the teacher is given it, or adds it up."""
    objective = PaperObjective(
        schedule=schedules.Cosine(), prediction="v_prediction", nonfinite="raise", distance="cosine",
        teacher=lambda x, t, cond: [x.flatten(1) * x.flatten(1)[:, :1] / 100],
    )  # fmt: skip
    clean, noise, x_t = torch.randn(3, B, 8).half()
    given, prediction = {"clean": clean, "noise": noise, "x_t": x_t}, torch.randn(B, 8)
    BEHIND[began](given, prediction)
    if began == "x_t'":
        noise[3].fill_(6e4)
    t_prime = torch.full((B,), 0.5)
    with pytest.raises(NonFiniteError, match="1 of 5 samples: sample 3") as caught:
        objective.loss(prediction.requires_grad_(), **given, t=torch.full((B,), 0.3), t_prime=t_prime)
    assert caught.value.samples == {3: began}


def test_a_message_names_eight_samples_at_most():
    objective = PaperObjective(
        schedule=schedules.Linear(), prediction="v_prediction", teacher=lambda x, t, cond: [x], nonfinite="raise"
    )
    clean = torch.full((20, 3), NAN)
    with pytest.raises(NonFiniteError, match=r"20 of 20 samples: sample 0 .*sample 7 .*; 12 more\. Mend") as caught:
        objective.loss(clean, clean=clean, noise=torch.ones(20, 3), t=torch.rand(20))
    assert "sample 8" not in str(caught.value)
    assert len(caught.value.samples) == 20


def test_infinities_of_a_mask_are_no_beginning():
    model, objective, given = setting(nonfinite="raise", call=lambda model, x, t, cond: model(x, t, cond["text"]))
    given["cond"] = {"text": given["cond"]["text"], "mask": torch.full((B, 5), -INF)}
    trained(model, objective, given)
    given["cond"]["text"][1] = INF
    with pytest.raises(NonFiniteError, match=r"1 of 5 .* begins in the student's prediction"):
        trained(model, objective, given)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_of_finite_batches_both_policies_give_what_the_default_gives(policy, reduction):
    expected = trained(*setting(mse_weight=0.5), reduction=reduction)
    found = trained(*setting(mse_weight=0.5, nonfinite=policy), reduction=reduction)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_to_look_at_the_gradient_wakes_no_hook_of_the_student():
    """FSDP gathers weights in hooks on the output, DDP has others: they are for the backward alone."""
    model, objective, given = setting(nonfinite="raise")
    woken = []
    model.register_forward_hook(
        lambda module, args, output: output.register_hook(lambda grad: woken.append(1)) and None
    )
    trained(model, objective, given)
    assert len(woken) == 1


def test_without_grad_the_values_are_looked_at():
    model, objective, given = setting(nonfinite="raise")
    spoil(given, 0)
    with torch.no_grad(), pytest.raises(NonFiniteError, match="sample 0"):
        objective(model, given["clean"], cond=given["cond"])


# --- "propagate": nothing is looked at --------------------------------------------------------------------------------


class Syncs(TorchDispatchMode):
    """Counts what waits for the device: each number that Python is given."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def test_the_default_waits_for_nothing_and_the_others_once():
    counted = {}
    for policy in ("propagate", "raise", "skip"):
        model, objective, given = setting(nonfinite=policy)
        objective(model, given["clean"], cond=given["cond"])  # a first pass looks around
        with Syncs() as syncs:
            objective(model, given["clean"], cond=given["cond"]).backward()
        counted[policy] = syncs.count
    assert counted["propagate"] == 4  # the ends of the schedule, which are numbers of the CPU
    assert counted["raise"] == counted["skip"] == 5


def test_by_default_a_bad_sample_stays_its_own_in_the_losses():
    model, objective, given = setting()
    model.eval()
    expected = objective(model, **given, reduction="none")
    spoil(given, 2)
    losses = objective(model, **given, reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False, False]
    assert torch.equal(losses[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])
    assert not objective.left_out


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_scaler_skips_a_step_that_overflows_in_the_teacher(optimizer):
    """As with any loss: weights and moments stay to the bit, and the scale is halved."""
    model, objective, given = setting(teacher=lambda x, t, cond: [(x.half() * 20).square()])
    scaler, moved = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100), []
    trains = optimizer(model.parameters(), lr=1e-6)
    for size in (1.0, 1e3, 1.0):
        before = copy.deepcopy((model.state_dict(), trains.state_dict()["state"]))
        trains.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(model, **given | {"clean": size * given["clean"]})
        assert bool(loss.isfinite()) == (size == 1.0)
        scaler.scale(loss).backward()
        scaler.step(trains)
        scaler.update()
        after = (model.state_dict(), trains.state_dict()["state"])
        moved.append((not same(before[0], after[0]), scaler.get_scale()))
        if size > 1:
            assert same(before[1], after[1])
    assert moved == [(True, 2.0**8), (False, 2.0**7), (True, 2.0**7)]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


# --- what is refused --------------------------------------------------------------------------------------------------


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="unknown nonfinite 'ignore', expected 'propagate', 'raise' or 'skip'"):
        setting(nonfinite="ignore")


def test_the_check_of_a_set_up_names_bad_data_itself():
    from perceptual_diffusion.checks import SetupError

    model, objective, given = setting(nonfinite="raise")
    objective.check(model, given["clean"], cond=given["cond"])
    spoil(given, 1)
    with pytest.raises(SetupError):
        objective.check(model, given["clean"], cond=given["cond"])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_teacher_that_gives_no_gradient_to_look_at_is_refused():
    from torch.utils.checkpoint import checkpoint

    objective = PaperObjective(
        schedule=schedules.Linear(), prediction="v_prediction", nonfinite="raise",
        teacher=lambda x, t, cond: [checkpoint(torch.tanh, x, use_reentrant=True)],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"`nonfinite` looks at each sample's gradient.*`use_reentrant=False`"):
        objective.loss(
            torch.randn(3, 4, requires_grad=True), clean=torch.ones(3, 4), noise=torch.ones(3, 4), t=torch.rand(3)
        )


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_sharded_student_or_teacher_cannot_skip(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model, objective, given = setting(nonfinite="skip")
    sharded = fully_shard(copy.deepcopy(model), mesh=mesh)
    with pytest.raises(
        ValueError, match=r"a second pass of the student on one process .*Wrap with `nonfinite='raise'`"
    ):
        objective(sharded, given["clean"], cond=given["cond"])
    objective = setting(nonfinite="skip", teacher=fully_shard(copy.deepcopy(model), mesh=mesh))[1]
    with pytest.raises(ValueError, match="a second pass of the teacher on one process"):
        objective(model, given["clean"], cond=given["cond"])


@STREAMS
def test_a_sharded_student_can_raise_and_its_gradient_is_right(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, objective, given = setting(nonfinite="raise")
    expected = trained(model, objective, given)
    sharded = fully_shard(copy.deepcopy(model), mesh=init_device_mesh("cpu", (1,)))
    loss, *_ = trained_sharded(sharded, objective, given)
    assert torch.equal(loss, expected[0])
    found = torch.cat([weight.grad.full_tensor().flatten() for weight in sharded.parameters()])
    assert distance(found, expected[1]) < TOLERANCE[torch.float32]


def trained_sharded(model, objective, given):
    model.train()
    torch.manual_seed(7)
    model.zero_grad()
    loss = objective(model, given["clean"], **{k: v for k, v in given.items() if k != "clean"})
    loss.backward()
    return loss.detach(), None


class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, text, table=None):
        return self.net(x, t, text, table)


DDP = nn.parallel.DistributedDataParallel
ROUND = {
    "static graph": lambda model: DDP(model, static_graph=True),
    "what is not used is looked for": lambda model: DDP(model, find_unused_parameters=True),
    "inside of a module": lambda model: Wrapped(DDP(model)),
    "one inside of the other": lambda model: DDP(Wrapped(DDP(model))),
}


@pytest.mark.parametrize("kind", ROUND)
def test_ddp_that_cannot_be_gone_around_is_refused(group, kind):
    model, objective, given = setting(nonfinite="skip")
    with pytest.raises(ValueError, match=r"a second pass of the student.*DDP .*Wrap with `nonfinite='raise'`"):
        objective(ROUND[kind](model), given["clean"], cond=given["cond"])


def test_a_student_that_is_no_module_is_refused():
    model, objective, given = setting(nonfinite="skip", call=lambda model, x, t, cond: model(x, t, **cond))
    with pytest.raises(TypeError, match=r"`model` is a function, expected a torch\.nn\.Module.*`nonfinite` is 'skip'"):
        objective(lambda *args, **cond: model(*args, **cond), given["clean"], cond=given["cond"])


def in_process(rank, path, results):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", NonFiniteWarning)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    found = {}
    for norm in (False, True):
        model, objective, given = setting(norm=norm, nonfinite="skip")
        model = nn.parallel.DistributedDataParallel(model)
        for case, bad in (("some", [1, 3]), ("all", list(range(B)))):
            _, _, given = setting(seed=rank)
            if rank:
                for row in bad:
                    spoil(given, row)
            model.module.load_state_dict(setting(norm=norm)[0].state_dict())
            trained(model, objective, given)
            found[norm, case] = gradient(model), len(objective.left_out)
    results[rank] = found
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rows", [[0, 2, 4], []], ids=["some", "none"])
def test_inside_ddp_the_second_pass_goes_around_it_and_its_hooks_still_fire(group, rows):
    model, objective, given = setting(norm=True, nonfinite="skip")
    plain, reference, _ = setting(norm=True)
    expected = trained(plain, reference, part_of(given, rows))[1] if rows else None
    wrapped = nn.parallel.DistributedDataParallel(model)
    reduced, passes = [], []
    wrapped.register_forward_hook(lambda *_: passes.append(1))
    wrapped.register_comm_hook(None, lambda _, bucket: reduced.append(bucket.buffer()) or done(bucket.buffer()))
    for row in {*range(B)} - {*rows}:
        spoil(given, row)
    with pytest.warns(NonFiniteWarning):
        found = trained(wrapped, objective, given)[1]
    assert len(passes) == 1
    assert sum(map(len, reduced)) == len(found)
    assert torch.equal(found, expected) if rows else not found.any()


def done(value):
    future = torch.futures.Future()
    future.set_result(value)
    return future


@pytest.mark.slow
def test_under_ddp_each_process_leaves_out_its_own_and_none_waits(tmp_path):
    """The gradient is the mean over processes of each one's own mean; a process without a good sample gives 0."""
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(in_process, (str(tmp_path), results), nprocs=2)
        results = dict(results)
    rows = [0, 2, 4]
    for norm in (False, True):
        model, objective, _ = setting(norm=norm)
        alone = []
        for rank in range(2):
            _, _, given = setting(seed=rank)
            model.load_state_dict(setting(norm=norm)[0].state_dict())
            alone.append(trained(model, objective, part_of(given, rows) if rank else given)[1])
        for rank in range(2):
            assert results[rank][norm, "some"][1] == (2 if rank else 0)
            assert distance(results[rank][norm, "some"][0], (alone[0] + alone[1]) / 2) < TOLERANCE[torch.float32]
            assert results[rank][norm, "all"][1] == (B if rank else 0)
            assert distance(results[rank][norm, "all"][0], alone[0] / 2) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("teacher", ["copy", "module"])
def test_a_first_batch_whose_only_sample_has_a_broken_condition_is_treated_like_any_other(teacher):
    for policy in ("propagate", "raise", "skip"):
        given = {"teacher": copy.deepcopy(setting()[0])} if teacher == "module" else {}
        model, objective, data = setting(nonfinite=policy, **given)
        broken, whole = part_of(copy.deepcopy(data), slice(0, 1)), part_of(data, slice(0, 1))
        spoil(broken, 0, "cond")
        if policy == "raise":
            with pytest.raises(NonFiniteError, match=r"sample 0 .* begins in `cond`"):
                trained(model, objective, broken)
        elif policy == "skip":
            with pytest.warns(NonFiniteWarning, match="begins in `cond`"):
                assert trained(model, objective, broken)[0] == 0
        else:
            assert trained(model, objective, broken)[0].isnan()
        expected = trained(*setting(**given)[:2], whole)[:2]
        assert all(map(torch.equal, trained(model, objective, whole)[:2], expected))


def test_weights_of_the_teacher_that_are_not_finite_are_named():
    model, _, data = setting()
    with torch.no_grad():
        model.first.weight.fill_(NAN)
    objective = PaperObjective.wrap(model, schedules.Linear(), prediction="v_prediction", layers="middle")
    with pytest.raises(ValueError, match="the teacher's layer 'middle' gives NaN or infinity"):
        trained(model, objective, data)
