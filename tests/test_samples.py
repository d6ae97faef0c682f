"""Samples of every structure: one loss for each sample, as if each were trained on alone.

The oracle takes a batch apart into its samples, and each of these into its parts, and works on numbers of one time.
"""

from collections import namedtuple

import pytest
import torch
from algorithm1 import DISTANCES
from paper import PaperObjective
from torch import nn

from perceptual_diffusion import schedules

Pair = namedtuple("Pair", ["left", "right"])

B, RAGGED, WIDTH = 3, (4, 2, 5), 3


class Sizes:
    """Draws (n, 3) for each sample: of one length, or of lengths of their own."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def even(self, n=4):
        return torch.randn(B, n, WIDTH, generator=self.generator, dtype=torch.float64)

    def ragged(self, lengths=RAGGED):
        return [torch.randn(n, WIDTH, generator=self.generator, dtype=torch.float64) for n in lengths]


STRUCTURES = {
    "a tensor": lambda s: s.even(),
    "a list": lambda s: s.ragged(),
    "a list of one size": lambda s: s.ragged((4, 4, 4)),
    "a tuple": lambda s: (s.even(), s.even(2)),
    "a tuple of one": lambda s: (s.even(),),
    "a dict": lambda s: {"image": s.even(), "sound": s.even(2)},
    "a named tuple": lambda s: Pair(s.even(), s.even(2)),
    "a dict of lists": lambda s: {"image": s.ragged(), "sound": s.ragged((1, 3, 2))},
    "a tuple of lists": lambda s: (s.ragged(), s.ragged((1, 3, 2))),
    "a named tuple of lists": lambda s: Pair(s.ragged(), s.ragged((1, 3, 2))),
    "a list beside a tensor": lambda s: {"image": s.ragged(), "sound": s.even(2)},
    "a tensor beside a list": lambda s: (s.even(2), s.ragged()),
    "a dict in a tuple": lambda s: ({"image": s.ragged(), "sound": s.even(2)}, s.even(1)),
}


def marked(table):
    return [pytest.param(*row, id=name) for name, row in table.items()]


# --- by hand ----------------------------------------------------------------------------------------------------------


def one(sample, i):
    """The parts of a sample of the batch, nested as they are, without a batch dimension."""
    if isinstance(sample, dict):
        return [one(part, i) for part in sample.values()]
    return [one(part, i) for part in sample] if isinstance(sample, tuple) else sample[i]


def flat(parts):
    return [parts] if isinstance(parts, torch.Tensor) else [leaf for part in parts for leaf in flat(part)]


def leaves(sample):
    if isinstance(sample, torch.Tensor):
        return [sample]
    return [leaf for part in (sample.values() if isinstance(sample, dict) else sample) for leaf in leaves(part)]


def mean_square(parts):
    """Of a part its mean square; of several parts their mean."""
    if isinstance(parts, torch.Tensor):
        return (parts**2).mean()
    return torch.stack([mean_square(part) for part in parts]).mean()


def scales(schedule, t):
    """(alpha, sigma, a, b) of a number t, with the prediction that the tests use on the schedule."""
    if schedule == "linear":
        return 1 - t, t, -1.0, 1.0  # noise - clean
    alpha, sigma = (torch.cos(t * torch.pi / 2), torch.sin(t * torch.pi / 2))
    return alpha, sigma, -sigma, alpha  # v


WEIGHTS = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def hidden(x, t):
    return torch.tanh(x @ WEIGHTS + t)


def teacher(x, t, cond):
    """Features of every part: a tensor (B, n, 3), or a list of (1, n, 3)."""
    if isinstance(x, list):
        return [[hidden(row, at)[None] for row, at in zip(x, t, strict=True)]]
    if isinstance(x, torch.Tensor):
        return [hidden(x, t.to(x.dtype)[:, None, None])]
    return [feature for part in (x.values() if isinstance(x, dict) else x) for feature in teacher(part, t, cond)]


def by_hand(
    schedule, predicted, clean, noise, t, t_prime, x_t=None, distance="mse", formulation="joint", mse_weight=0.0
):
    """Algorithm 1 (Lin & Yang) for each sample alone, (B,)."""
    losses = []
    for i in range(B):
        alpha, sigma, a, b = scales(schedule, t[i])
        alpha_tt, sigma_tt, *_ = scales(schedule, t_prime[i])
        delta, terms = alpha * b - sigma * a, []
        seen = flat(one(x_t, i)) if x_t is not None else None
        columns = zip(*(flat(one(s, i)) for s in (predicted, clean, noise)), strict=True)
        for k, (y, x, e) in enumerate(columns):
            given = alpha * x + sigma * e if seen is None else seen[k]
            clean_hat, noise_hat = (b * given - sigma * y) / delta, (alpha * y - a * given) / delta
            true = hidden(alpha_tt * x + sigma_tt * e, t_prime[i])
            pairs = {"joint": [(clean_hat, noise_hat)], "split": [(clean_hat, e), (x, noise_hat)]}[formulation]
            told = [hidden(alpha_tt * c + sigma_tt * n, t_prime[i]) for c, n in pairs]
            terms.append(sum(DISTANCES[distance](f[None], true[None])[0] for f in told))
        errors = nested(lambda y, x, e, a=a, b=b: y - (a * x + b * e), *(one(s, i) for s in (predicted, clean, noise)))
        losses.append(torch.stack(terms).mean() + mse_weight * mean_square(errors))
    return torch.stack(losses)


def nested(function, *samples):
    if isinstance(samples[0], torch.Tensor):
        return function(*samples)
    return [nested(function, *column) for column in zip(*samples, strict=True)]


class Setup:
    """A batch of a structure, and an objective on the straight path or on the quarter circle."""

    def __init__(self, structure, schedule="linear", **options):
        make = STRUCTURES[structure]
        self.clean, self.noise, self.predicted, self.x_t = (make(Sizes(seed)) for seed in range(4))
        self.schedule = schedule
        self.objective = PaperObjective(
            schedule={"linear": schedules.Linear(), "cosine": schedules.Cosine()}[schedule],
            prediction={"linear": "flow_prediction", "cosine": "v_prediction"}[schedule], teacher=teacher, **options,
        )  # fmt: skip
        self.t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
        self.t_prime = torch.tensor([0.7, 0.1, 0.35], dtype=torch.float64)
        self.given = {"clean": self.clean, "noise": self.noise, "t": self.t, "t_prime": self.t_prime}

    def losses(self, **options):
        return self.objective.loss(self.predicted, reduction="none", **self.given | options)

    def expected(self, **options):
        return by_hand(self.schedule, self.predicted, **self.given, **options)


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


def same_structure(sample, like):
    """Whether two samples have the same types, keys and shapes."""
    if type(sample) is not type(like):
        return False
    if isinstance(sample, torch.Tensor):
        return sample.shape == like.shape and sample.dtype == like.dtype
    if isinstance(sample, dict):
        return list(sample) == list(like) and all(same_structure(sample[key], like[key]) for key in like)
    return len(sample) == len(like) and all(map(same_structure, sample, like))


# --- every structure is its samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("formulation", ["joint", "split"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_loss_of_each_sample_is_that_of_algorithm_1_on_it_alone(structure, distance, formulation, schedule):
    setup = Setup(structure, schedule, distance=distance, formulation=formulation)
    close(setup.losses(), setup.expected(distance=distance, formulation=formulation))


@pytest.mark.parametrize("formulation", ["joint", "split"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_x_t_of_the_users_own_is_solved_for_in_every_structure(structure, formulation):
    setup = Setup(structure, "cosine", formulation=formulation)
    close(setup.losses(x_t=setup.x_t), setup.expected(x_t=setup.x_t, formulation=formulation))
    usual = setup.objective.add_noise(setup.clean, setup.noise, setup.t)
    assert torch.equal(setup.losses(x_t=usual), setup.losses())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_gradient_of_each_part_is_that_of_its_own_sample(structure):
    setup = Setup(structure, mse_weight=0.5)
    parts = [leaf.requires_grad_() for leaf in leaves(setup.predicted)]
    found, wanted = (
        torch.autograd.grad(losses @ torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), parts)
        for losses in (setup.losses(), setup.expected(mse_weight=0.5))
    )
    for gradient, right in zip(found, wanted, strict=True):
        close(gradient, right)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_mse_weight_adds_the_mean_over_the_parts_and_terms_hold_both(structure):
    setup = Setup(structure, mse_weight=0.3)
    close(setup.losses(), setup.expected(mse_weight=0.3))
    assert setup.objective.terms["mse"].shape == (B,)
    close(setup.objective.terms["sp"], setup.expected())
    close(setup.objective.terms["sp"] + 0.3 * setup.objective.terms["mse"], setup.losses())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_weights_and_the_mean_are_over_samples_not_over_numbers(structure):
    setup = Setup(structure, weight=lambda t: 1 + t)
    close(setup.losses(), (1 + setup.t) * setup.expected())
    close(setup.objective.loss(setup.predicted, **setup.given), ((1 + setup.t) * setup.expected()).mean())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_add_noise_and_target_keep_the_structure_and_mix_by_each_samples_time(structure, schedule):
    setup = Setup(structure, schedule)
    x_t = setup.objective.add_noise(setup.clean, setup.noise, setup.t)
    target = setup.objective.target(setup.clean, setup.noise, setup.t)
    assert same_structure(x_t, setup.clean)
    assert same_structure(target, setup.clean)
    for i in range(B):
        alpha, sigma, a, b = scales(schedule, setup.t[i])
        columns = zip(*(flat(one(s, i)) for s in (x_t, target, setup.clean, setup.noise)), strict=True)
        for mixed, aim, x, e in columns:
            close(mixed, alpha * x + sigma * e)
            close(aim, a * x + b * e)


@pytest.mark.parametrize("formulation", ["joint", "split"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_loss_of_the_target_is_exactly_zero(structure, formulation):
    setup = Setup(structure, "cosine", formulation=formulation, mse_weight=1.0)
    setup.predicted = setup.objective.target(setup.clean, setup.noise, setup.t)
    assert not setup.losses().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("structure", ["a list", "a dict of lists", "a named tuple"])
def test_samples_keep_their_dtype_and_the_loss_is_float32(structure, dtype):
    setup = Setup(structure)
    low = lambda sample: nested_as(sample, lambda x: x.to(dtype))  # noqa: E731
    setup.clean, setup.noise, setup.predicted = map(low, (setup.clean, setup.noise, setup.predicted))
    x_t = setup.objective.add_noise(setup.clean, setup.noise, setup.t)
    assert same_structure(x_t, setup.clean)
    objective = PaperObjective(
        schedule=schedules.Linear(), prediction="flow_prediction",
        teacher=lambda x, t, cond: teacher(nested_as(x, torch.Tensor.double), t, cond),
    )  # fmt: skip
    setup.given |= {"clean": setup.clean, "noise": setup.noise}
    loss = objective.loss(setup.predicted, reduction="none", **setup.given)
    wanted = by_hand(
        "linear", *(nested_as(s, torch.Tensor.double) for s in (setup.predicted, setup.clean, setup.noise)),
        setup.t, setup.t_prime,
    )  # fmt: skip
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, wanted, rtol=0.1, atol=0.02)


def nested_as(sample, function):
    if isinstance(sample, torch.Tensor):
        return function(sample)
    if isinstance(sample, dict):
        return {key: nested_as(part, function) for key, part in sample.items()}
    items = [nested_as(part, function) for part in sample]
    return type(sample)(*items) if hasattr(sample, "_fields") else type(sample)(items)


# --- lists and stacks -------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """A small network of rows (n, 3): of a tensor (B, n, 3), or of a list packed into one sequence."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(WIDTH, 6), nn.Linear(6, 6), nn.Linear(6, WIDTH)

    def forward(self, x, t, shift=0.0):
        lengths = [len(row) for row in x]
        packed = torch.cat([*x]) if isinstance(x, list) else x.flatten(0, 1)
        times = t.to(packed.dtype).repeat_interleave(torch.tensor(lengths))[:, None]
        rows = self.last(torch.tanh(self.middle(torch.tanh(self.first(packed) + times + shift))))
        return list(rows.split(lengths)) if isinstance(x, list) else rows.view(x.shape)


def wrapped(model=None, **options):
    torch.manual_seed(0)
    model = model or Rows()
    objective = PaperObjective.wrap(model, schedules.Linear(), prediction="flow_prediction", layers="middle", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model, objective


def gradients(model, losses):
    return torch.autograd.grad(losses @ torch.tensor([1.0, 2.0, 4.0]), list(model.parameters()))


@pytest.mark.parametrize("formulation", ["joint", "split"])
@pytest.mark.parametrize("distance", ["mse", "mae", "huber", "normalised"])
def test_a_list_of_one_size_is_the_stack(distance, formulation):
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, B, 4, WIDTH, generator=generator)
    t, t_prime = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.7, 0.1, 0.35])
    stacked, listed = [], []
    for found, make in ((stacked, lambda x: x), (listed, list)):
        model, objective = wrapped(distance=distance, formulation=formulation, mse_weight=0.1, weight="min_snr")
        given = {"noise": make(noise), "t": t, "t_prime": t_prime}
        losses = objective(model, make(clean), reduction="none", **given)
        found += [losses, *gradients(model, losses)]
        for mixed in (objective.add_noise, objective.target):
            found.append(torch.stack(list(mixed(make(clean), make(noise), t))))
    for one_of_list, of_stack in zip(listed, stacked, strict=True):
        torch.testing.assert_close(one_of_list, of_stack, rtol=1e-6, atol=1e-7)
    assert all(map(torch.equal, listed[-2:], stacked[-2:]))


@pytest.mark.parametrize("distance", ["mse", "mae", "huber", "normalised"])
def test_each_sample_of_a_list_trains_as_it_does_alone(distance):
    generator = torch.Generator().manual_seed(0)
    clean, noise = ([torch.randn(n, WIDTH, generator=generator) for n in (5, 2, 3)] for _ in range(2))
    t, t_prime = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.7, 0.1, 0.35])
    model, objective = wrapped(distance=distance)
    together = objective(model, clean, noise=noise, t=t, t_prime=t_prime, reduction="none")
    for i in range(B):
        (alone,) = objective(
            model, clean[i][None], noise=noise[i][None], t=t[i : i + 1], t_prime=t_prime[i : i + 1], reduction="none"
        )
        torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-7)
        for a, b in zip(
            *(torch.autograd.grad(x, list(model.parameters()), retain_graph=True) for x in (together[i], alone)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("structure", ["a list", "a dict of lists", "a named tuple of lists", "a dict in a tuple"])
def test_calling_is_loss_of_what_the_model_gives_for_add_noise(structure):
    setup = Setup(structure)
    seen = []

    def model(x, t, **cond):
        seen.append(x)
        return nested_as(x, torch.tanh)

    setup.objective.output = lambda output, x_t: output
    called = setup.objective(model, **setup.given, reduction="none")
    x_t = setup.objective.add_noise(setup.clean, setup.noise, setup.t)
    assert same_structure(seen[0], setup.clean)
    assert all(map(torch.equal, leaves(seen[0]), leaves(x_t)))
    setup.predicted = nested_as(x_t, torch.tanh)
    assert torch.equal(called, setup.losses())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_noise_is_drawn_for_every_part_from_the_generator(structure):
    setup, seen = Setup(structure), []

    def model(x, t, **cond):
        seen.append(x)
        return x

    setup.objective.output = lambda output, x_t: output
    losses = [
        setup.objective(model, setup.clean, t=setup.t, generator=torch.Generator().manual_seed(seed), reduction="none")
        for seed in (1, 1, 2)
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
    assert losses[0].shape == (B,)
    noises = [
        (mixed - (1 - setup.t[i]) * x) / setup.t[i]
        for i in range(B)
        for mixed, x in zip(flat(one(seen[0], i)), flat(one(setup.clean, i)), strict=True)
    ]
    drawn = torch.cat([noise.flatten() for noise in noises])
    assert len(drawn.unique()) == len(drawn), "no two numbers share a draw"
    assert same_structure(seen[0], setup.clean)


def test_the_parts_of_a_dict_may_come_in_any_order():
    setup = Setup("a dict of lists")
    turned = {name: dict(reversed(setup.given[name].items())) for name in ("clean", "noise")}
    for name, value in turned.items():
        assert torch.equal(setup.losses(**{name: value}), setup.losses())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_times_are_drawn_one_for_each_sample(structure):
    setup, seen = Setup(structure, seed=3), []
    setup.objective.output = lambda output, x_t: output
    setup.objective(lambda x, t, **cond: seen.append(t) or x, setup.clean)
    assert seen[0].shape == (B,)


# --- what is refused --------------------------------------------------------------------------------------------------

X, Y, Z = torch.ones(4, 3), torch.ones(2, 3), torch.ones(5, 3)
LIST = [X, Y, Z]
SHAPES = r"\[\(4, 3\), \(2, 3\), \(5, 3\)\]"
BAD = {
    "noise is too short": (ValueError, rf"`noise` has shape \[\(4, 3\), \(2, 3\)\], expected {SHAPES}, that of `clean`", {"noise": [X, Y]}),
    "noise is a tuple": (
        (TypeError, ValueError), r"`noise` .*(tuple|list)", {"noise": (X, Y, Z)},
    ),
    "noise is a tensor": (ValueError, rf"`noise` has shape \(3, 3\), expected {SHAPES}", {"noise": torch.ones(3, 3)}),
    "a noise of another size": (ValueError, r"`noise\[1\]` has shape \(4, 3\), expected \(2, 3\)", {"noise": [X, X, Z]}),
    "a noise that would broadcast": (ValueError, r"`noise\[1\]` has shape \(1, 3\), expected \(2, 3\)", {"noise": [X, Y[:1], Z]}),
    "a noise on another device": (ValueError, r"`noise\[1\]` is on meta, expected cpu", {"noise": [X, Y.to("meta"), Z]}),
    "a prediction too many": (ValueError, rf"`model_pred` has shape .*, expected {SHAPES}", {"model_pred": [*LIST, X]}),
    "a stacked prediction": (ValueError, rf"`model_pred` has shape \(3, 4, 3\), expected {SHAPES}", {"model_pred": torch.ones(3, 4, 3)}),
    "a prediction that is no tensor": (TypeError, r"`model_pred\[2\]` is a NoneType", {"model_pred": [X, Y, None]}),
    "an x_t too few": (ValueError, rf"`x_t` has shape .*, expected {SHAPES}", {"x_t": [X, Y]}),
    "times too few": (ValueError, r"`t` has shape \(2,\), expected \(3,\), one time per sample", {"t": torch.tensor([0.1, 0.2])}),
    "second times too many": (ValueError, r"`t_prime` has shape \(4,\), expected \(3,\)", {"t_prime": torch.full((4,), 0.5)}),
    "a dict of another name": (ValueError, r"`noise` has shape \{'b': .*expected \{'a': ", {"clean": {"a": LIST}, "noise": {"b": LIST}}),
    "a dict of one name more": (ValueError, r"`noise` has shape .*expected \{'a': ", {"clean": {"a": LIST}, "noise": {"a": LIST, "b": LIST}}),
    "an empty list": (ValueError, "`clean` is empty, expected .* or a list of B tensors", {"clean": []}),
    "a list of lists": (
        TypeError, "`clean` has shape .*, expected a list of B tensors, one per sample. Use a tuple or a dict",
        {"clean": [LIST, LIST, LIST]},
    ),
    "a list of dicts": (TypeError, "`clean` has shape .*expected a list of B tensors", {"clean": [{"a": X}] * 3}),
    "a list of integers": (TypeError, r"`clean\[0\]` has dtype torch.int64, expected a floating dtype", {"clean": [x.long() for x in LIST]}),
    "a list with a hole": (TypeError, r"`clean\[1\]` is a NoneType", {"clean": [X, None, Z]}),
    "a number in a list": (
        ValueError, r"`clean\[1\]` has shape \(\), expected (?!.*\[None\])", {"clean": [X, torch.tensor(1.0), Z]},
    ),
    "a generator": (TypeError, "`clean` is a generator", {"clean": (x for x in LIST)}),
    "parts of different batches": (
        ValueError, r"`clean` has shape .*its parts differ in the number of samples", {"clean": {"a": LIST, "b": [X, Y]}},
    ),
    "a list and a tensor of different batches": (
        ValueError, r"its parts differ in the number of samples", {"clean": (LIST, torch.ones(2, 3))},
    ),
    "a sample on meta": (
        ValueError, r"`clean\[1\]` is on the meta device, where it has no values", {"clean": [X, Y.to("meta"), Z]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "options"), marked(BAD))
def test_a_bad_list_is_refused(error, message, options):
    objective = PaperObjective(
        schedule=schedules.Linear(), prediction="flow_prediction", teacher=lambda x, t, cond: [[row[None] for row in x]]
    )
    arguments = {"clean": LIST, "t": torch.tensor([0.1, 0.5, 0.9])} | options
    arguments = {"noise": arguments["clean"], "model_pred": arguments["clean"]} | arguments
    with pytest.raises(error, match=message):
        objective.loss(arguments.pop("model_pred"), **arguments)


NONE = {"a sample of no numbers": ([X, Y[:0], Z],), "a tensor of no numbers": (torch.ones(3, 0, 3),)}


@pytest.mark.parametrize("clean", marked(NONE))
def test_a_sample_of_no_numbers_has_no_error(clean):
    objective = PaperObjective(
        schedule=schedules.Linear(), prediction="flow_prediction", mse_weight=1.0,
        teacher=lambda x, t, cond: [torch.stack([row.sum()[None] for row in x])],
    )  # fmt: skip
    t = torch.tensor([0.1, 0.5, 0.9])
    losses = objective.loss(clean, clean=clean, noise=clean, t=t, t_prime=t, reduction="none")
    assert losses.isfinite().all()
    assert losses[1] == 0


FEATURES = {
    "too few": (ValueError, r"a feature has shapes .*, expected 3 tensors of shape \(1, \*\), one per sample", lambda x: [[row[None] for row in x[:2]]]),
    "without a batch": (ValueError, r"a feature has shapes .*, expected 3 tensors of shape \(1, \*\)", lambda x: [x]),
    "nested": (TypeError, "`teacher` gives .*expected a list of features", lambda x: [[[row] for row in x]]),
    "nothing": (TypeError, "`teacher` gives .*expected a list of features", lambda x: [[]]),
    "numbers": (TypeError, "`teacher` gives .*expected a list of features", lambda x: [[row.sum() for row in x]]),
    "of other sizes without grad": (
        ValueError, "`teacher` gives features of shapes .* expected the same in every pass",
        lambda x: [[row[None, : 2 if torch.is_grad_enabled() else 1] for row in x]],
    ),
    "without a gradient": (
        ValueError, "`teacher` gives no gradient to the sample", lambda x: [[row.detach()[None] for row in x]]
    ),
    "one without a gradient": (
        ValueError, "`teacher` gives no gradient to the sample",
        lambda x: [[(row if i else row.detach())[None] for i, row in enumerate(x)]],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "features"), FEATURES.values(), ids=FEATURES)
def test_bad_features_of_a_list_are_refused(error, message, features):
    objective = PaperObjective(
        schedule=schedules.Linear(), prediction="flow_prediction", teacher=lambda x, t, cond: features(x)
    )
    predicted = [x.clone().requires_grad_() for x in LIST]
    with pytest.raises(error, match=message):
        objective.loss(predicted, clean=LIST, noise=LIST, t=torch.tensor([0.1, 0.5, 0.9]))


def test_a_distance_that_loses_the_sample_is_named_for_a_list_too():
    objective = PaperObjective(
        schedule=schedules.Linear(), prediction="flow_prediction", distance=lambda f, g: (f - g).square().mean(),
        teacher=lambda x, t, cond: [[row[None] for row in x]],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"`distance` gives \(\), expected one value per sample, shape \(1,\)"):
        objective.loss(LIST, clean=LIST, noise=LIST, t=torch.tensor([0.1, 0.5, 0.9]))


class Looping(Rows):
    """Runs its layers once for each sample."""

    def forward(self, x, t):
        return [super(Looping, self).forward(row[None], at[None])[0] for row, at in zip(x, t, strict=True)]


@pytest.mark.parametrize("lengths", [(4, 2, 5), (3, 3, 3), (6, 2, 1), (1, 1, 1)])
def test_a_layer_that_runs_once_for_each_sample_is_refused(lengths):
    model, objective = wrapped(Looping())
    clean = [torch.randn(n, WIDTH) for n in lengths]
    with pytest.raises(ValueError, match="the 3 samples cannot be told apart"):
        objective(model, clean)
