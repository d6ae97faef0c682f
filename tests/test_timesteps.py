"""Samplers of t and t': their distributions, ends, dtype, and where their randomness comes from."""

import copy
import math
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import ConvNet
from paper import PaperObjective
from torch.utils._python_dispatch import TorchDispatchMode

from perceptual_diffusion import schedules, timesteps
from perceptual_diffusion.schedules import EDM, Cosine, Discrete, Interpolant, Linear
from perceptual_diffusion.timesteps import Clean, Contributing, LogitNormal, Near, Shifted, Uniform

TABLE = Discrete.scaled_linear()
CONTINUOUS = {"flow": Linear(), "flow_scale_1000": Linear(scale=1000), "cosine": Cosine(), "edm": EDM()}
SCHEDULES = {"table": TABLE, **CONTINUOUS}
COUNT = 20_000

every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
continuous = pytest.mark.parametrize("schedule", CONTINUOUS.values(), ids=CONTINUOUS)
samplers = pytest.mark.parametrize("sampler", timesteps.NAMED.values(), ids=timesteps.NAMED)


def draw(sampler, schedule, count=COUNT, t=None, seed=0):
    return sampler(schedule, torch.zeros(count, 1), t=t, generator=torch.Generator().manual_seed(seed))


def middle(schedule, count=COUNT):
    """The time half-way, `count` times, in the dtype that the samplers give."""
    t = schedule.at(torch.full((count,), 0.5, dtype=torch.float64))
    return t if schedule.discrete else t.float()


def distance_of_distributions(sample, inverse):
    """Kolmogorov's: the largest gap between the quantiles' levels; about 1 / √n where the sample is of that kind."""
    levels = inverse(sample.double().sort().values)
    steps = (torch.arange(len(sample), dtype=torch.float64) + 0.5) / len(sample)
    return float((levels - steps).abs().max())


SAME = 1.95 / math.sqrt(COUNT)
"""Kolmogorov's distance that one sample in a thousand exceeds."""


def chi_square(counts):
    """The statistic of equal shares, in standard deviations from its mean."""
    expected, freedom = counts.sum() / len(counts), len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


# Uniform


def test_uniform_reaches_every_index_equally_often():
    counts = draw(Uniform(), TABLE).bincount(minlength=1000)
    assert len(counts) == 1000
    assert (counts > 0).all()
    assert abs(chi_square(counts)) < 5


@continuous
def test_uniform_is_uniform_in_rank(schedule):
    t = draw(Uniform(), schedule)
    assert distance_of_distributions(t, schedule.rank) < SAME


def test_uniform_on_edm_is_the_training_distribution():
    """Karras et al. 2022: ln sigma ~ N(−1.2, 1.2²)."""
    log_sigma = draw(Uniform(), EDM()).double().log()
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=0.03)
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=0.03)


@pytest.mark.parametrize(("low", "high"), [(10, 20), (0, 9), (990, 999), (500, 501), (7, 7)])
def test_low_and_high_are_both_drawn_on_a_table_and_nothing_outside(low, high):
    counts = draw(Uniform(low=low, high=high), TABLE).bincount(minlength=1000)
    assert int(counts[low : high + 1].sum()) == COUNT
    assert (counts[low : high + 1] > 0).all()
    if low < high:
        assert abs(chi_square(counts[low : high + 1])) < 5


@pytest.mark.parametrize(("low", "high", "first", "last"), [(None, 3, 0, 3), (996, None, 996, 999)])
def test_an_open_end_is_the_schedules(low, high, first, last):
    assert draw(Uniform(low=low, high=high), TABLE).unique().tolist() == list(range(first, last + 1))


def test_a_fractional_end_lets_no_index_outside_it_through():
    assert draw(Uniform(low=10.5, high=13.5), TABLE).unique().tolist() == [11, 12, 13]


@pytest.mark.parametrize("sampler", [Uniform, LogitNormal])
@pytest.mark.parametrize(
    ("schedule", "low", "high"),
    [
        (Linear(), 0.3, 0.7),
        (Linear(), 0.1, 0.9),
        (Linear(scale=1000), 100, 200),
        (Cosine(), 0.05, 0.1),
        (EDM(), 0.5, 2.0),
    ],
)
def test_low_and_high_bound_continuous_times(sampler, schedule, low, high):
    t = draw(sampler(low=low, high=high), schedule)
    ends = torch.tensor([low, high])  # float32, as the times
    assert t.min() >= ends[0]
    assert t.max() <= ends[1]
    wide = (high - low) * (0.002 if sampler is Uniform else 0.1)
    assert float(t.min()) < low + wide
    assert float(t.max()) > high - wide


@given(shift=st.floats(0.1, 10), seed=st.integers(0, 99))
def test_the_shift_moves_a_uniform_time_as_esser_et_al_have_it(shift, seed):
    """Eq. 23: s u / (1 + (s − 1) u)."""
    u = draw(Uniform(), Linear(), 50, seed=seed).double()
    t = draw(Uniform(shift=shift), Linear(), 50, seed=seed).double()
    torch.testing.assert_close(t, shift * u / (1 + (shift - 1) * u), rtol=1e-5, atol=1e-6)


def test_a_shift_above_1_favours_the_noise():
    shifted = draw(Uniform(shift=3.0), Linear())
    assert distance_of_distributions(shifted, lambda t: t / (3 - 2 * t)) < SAME
    assert float(shifted.mean()) > 0.6
    assert float(draw(Uniform(shift=1 / 3), Linear()).mean()) < 0.4
    assert float(draw(LogitNormal(shift=3.0), Linear()).mean()) > 0.6


REVERSED = {
    "reversed": Linear(reverse=True),
    "reversed_scale_1000": Linear(scale=1000, reverse=True),
    "sit": Interpolant(lambda t: t, lambda t: 1 - t),
}


@pytest.mark.parametrize("schedule", REVERSED.values(), ids=REVERSED)
@pytest.mark.parametrize(
    "sampler", [Uniform(), Uniform(shift=3.0), LogitNormal(mean=1.0), LogitNormal(mean=-1.0, shift=3.0)], ids=repr
)
def test_a_reversed_schedule_draws_as_much_noise_as_a_forward_one(sampler, schedule):
    """Shift and mean move times toward the noise, at whichever end it is."""
    forward, reverse = draw(sampler, Linear()), draw(sampler, schedule)
    torch.testing.assert_close(schedule.level(reverse), forward.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", REVERSED.values(), ids=REVERSED)
def test_the_shift_of_a_reversed_schedule_stays_within_low_and_high(schedule):
    low, high = 0.1 * schedule.high, 0.2 * schedule.high
    t = draw(Uniform(low=low, high=high, shift=3.0), schedule)
    assert float(t.min()) == pytest.approx(low, rel=1e-3)
    assert float(t.max()) == pytest.approx(high, rel=1e-3)
    assert float(t.mean()) < 0.14 * schedule.high  # near low, where more noise is


def test_the_shift_stays_within_low_and_high():
    t = draw(Uniform(low=100, high=200, shift=3.0), TABLE)
    assert (t.min(), t.max()) == (100, 200)
    assert float(t.double().mean()) > 160


def test_the_shift_may_depend_on_the_clean_sample():
    def shift(clean):
        return float(math.prod(clean.shape[1:]))

    for size in (1, 4):
        like, generator = torch.zeros(50, size), torch.Generator().manual_seed(0)
        t = Uniform(shift=shift)(Linear(), like, t=None, generator=generator)
        assert torch.equal(t, draw(Uniform(shift=float(size)), Linear(), 50))


# Logit-normal


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.0), (1.0, 0.5)])
@continuous
def test_logit_normal_is_the_sigmoid_of_a_normal(schedule, mean, std):
    t = draw(LogitNormal(mean=mean, std=std), schedule)

    def level(times):
        return torch.special.ndtr((torch.logit(schedule.rank(times)) - mean) / std)

    assert distance_of_distributions(t, level) < SAME


def test_logit_normal_favours_the_middle_of_a_table():
    counts = draw(LogitNormal(), TABLE).bincount(minlength=1000)
    quantiles = torch.sigmoid(torch.randn(COUNT)).quantile(torch.tensor([0.1, 0.5, 0.9]))
    levels = counts.cumsum(0) / COUNT
    for quantile, level in zip(quantiles, (0.1, 0.5, 0.9), strict=True):
        assert float(levels[int(1000 * quantile)]) == pytest.approx(level, abs=0.02)


# Near


@pytest.mark.parametrize("std", [20.0, 100.0])
@pytest.mark.parametrize("name", ["table", "flow", "flow_scale_1000", "cosine"])
def test_near_is_normal_around_t_on_the_scale_of_1000(name, std):
    schedule = SCHEDULES[name]
    t = middle(schedule)
    moved = 1000 * (schedule.rank(draw(Near(std=std), schedule, t=t)) - schedule.rank(t))
    assert float(moved.mean()) == pytest.approx(0, abs=4 * std / math.sqrt(COUNT))
    assert float(moved.std()) == pytest.approx(std, rel=0.03)
    assert distance_of_distributions(moved, lambda m: torch.special.ndtr(m / std)) < SAME + 0.5 / std


def test_near_has_a_standard_deviation_of_100_by_default():
    t = middle(TABLE)
    assert float((draw(Near(), TABLE, t=t) - t).double().std()) == pytest.approx(100, rel=0.03)


@every
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_near_is_clamped_to_the_schedule(schedule, end):
    bound = schedule.at(torch.tensor([end], dtype=torch.float64))
    bound = bound if schedule.discrete else bound.float()
    t = draw(Near(), schedule, 2000, t=bound.expand(2000))
    assert ((t >= bound) if end == 0 else (t <= bound)).all()
    assert 0.4 < float((t == bound).float().mean()) < 0.6


# Shifted


def test_shifted_is_40_timesteps_away_on_either_side():
    t = torch.arange(40, 960)
    sides = set()
    for seed in range(20):
        moved = draw(Shifted(), TABLE, len(t), t=t, seed=seed) - t
        assert (moved.abs() == 40).all()
        sides.add(tuple(moved.unique().tolist()))
        assert 0.4 < float((moved == 40).double().mean()) < 0.6
    assert sides == {(-40, 40)}


def test_shifted_goes_to_the_other_side_where_the_schedule_ends():
    t = torch.tensor([0, 1, 39, 960, 998, 999])
    for seed in range(10):
        moved = draw(Shifted(), TABLE, len(t), t=t, seed=seed) - t
        assert moved.tolist() == [40, 40, 40, -40, -40, -40]


@given(by=st.integers(1, 499), t=st.integers(0, 999), seed=st.integers(0, 9))
def test_shifted_is_the_distance_asked_for_at_every_time(by, t, seed):
    moved = draw(Shifted(by=by), TABLE, 4, t=torch.full((4,), t), seed=seed) - t
    assert (moved.abs() == by).all()
    assert ((t + moved >= 0) & (t + moved <= 999)).all()


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_shifted_is_the_same_fraction_of_a_continuous_schedule(scale):
    schedule = Linear(scale=scale)
    t = scale * torch.linspace(0, 1, 101)
    moved = (draw(Shifted(), schedule, 101, t=t) - t).double() / scale
    torch.testing.assert_close(moved.abs(), torch.full((101,), 0.04, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (moved[:4] > 0).all()
    assert (moved[-4:] < 0).all()
    assert (moved > 0).any()
    assert (moved[10:-10] < 0).any()


def test_shifted_reaches_both_ends_of_the_schedule():
    moved = draw(Shifted(by=500), Linear(), 100, t=torch.full((100,), 0.5))
    assert moved.unique().tolist() == [0, 1]


def test_shifted_on_a_shorter_table_is_4_percent_of_it():
    t = torch.arange(100)
    assert ((draw(Shifted(), Discrete.linear(steps=100), 100, t=t) - t).abs() == 4).all()


# Contributing

SHORT = Discrete.linear(steps=12)
ALL = SCHEDULES | {
    "short_table": SHORT,
    "zero_snr": TABLE.zero_terminal_snr(),
    "flow_shift_3": Linear(shift=3.0),
    "reversed": Linear(scale=1000, reverse=True),
    "sit": Interpolant(lambda t: t, lambda t: 1 - t, low=0.0, high=1.0),
}
NARROW = EDM(**{f"sigma_{end}": math.exp(1.2 * torch.special.ndtri(torch.tensor(rank, dtype=torch.float64)) - 1.2)
                for end, rank in (("min", 0.3003), ("max", 0.8007))})  # fmt: skip
"""Half of its ranks are one of its ends, and the bins in which they begin have their middles inside."""
by_hand = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
every_kind = pytest.mark.parametrize("schedule", [*ALL.values(), NARROW], ids=[*ALL, "edm_narrow"])


def middles(schedule):
    """The time in the middle of each bin of rank: each index, or each thousandth."""
    count = len(schedule.grid()) if schedule.discrete else 1000
    times = schedule.at((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return times if schedule.discrete else times.float()


def density(schedule, t, uniform=0.1):
    """q(t'|t) of each bin for a single t, written out by hand."""
    (alpha, sigma), (alphas, sigmas) = schedule(t[None]), schedule(middles(schedule))
    kappa = (sigmas * alpha - alphas * sigma).abs()
    return (1 - uniform) * kappa / kappa.sum() + uniform / len(kappa)


def levels(schedule, low=0.05, high=0.95, count=4):
    t = schedule.at(torch.linspace(low, high, count, dtype=torch.float64))
    return t if schedule.discrete else t.float()


@by_hand
@pytest.mark.parametrize("uniform", [0.1, 1.0])
def test_contributing_weighs_by_uniform_over_its_density(schedule, uniform):
    at = middles(schedule)
    for t in levels(schedule):
        weight = Contributing(uniform=uniform).weight(schedule, t.expand(len(at)), at)
        assert weight.dtype == torch.float64
        torch.testing.assert_close(weight, 1 / (len(at) * density(schedule, t, uniform)), rtol=1e-6, atol=0)


@every_kind
@pytest.mark.parametrize("uniform", [0.1, 0.5])
def test_contributing_draws_from_the_density_that_its_weights_say(schedule, uniform):
    sampler, n, at = Contributing(uniform=uniform), 3000, middles(schedule)
    for seed, t in enumerate(levels(schedule)):
        q = 1 / (len(at) * sampler.weight(schedule, t.expand(len(at)), at))
        assert float(q.sum()) == pytest.approx(1, abs=1e-9)
        drawn = draw(sampler, schedule, n, t.expand(n), seed)
        place, bins = ((schedule.rank(x) * len(at)).long().clamp(0, len(at) - 1) for x in (drawn, at))
        counts = place.bincount(minlength=len(at))
        expected = torch.zeros(len(at), dtype=torch.float64).index_add(0, bins, q)  # on EDM some bins share their time
        assert float((counts.cumsum(0) / n - expected.cumsum(0)).abs().max()) < 1.95 / math.sqrt(n)


@every_kind
def test_contributing_weighs_the_ends_of_a_schedule_as_the_bins_that_hold_them(schedule):
    t = levels(schedule)[1:2]
    ends, at = schedule.at(torch.tensor([0.0, 1.0], dtype=torch.float64)), middles(schedule)[[0, -1]]
    weights = [Contributing().weight(schedule, t.expand(2), times) for times in (ends, at)]
    torch.testing.assert_close(*weights)


def test_contributing_draws_anywhere_within_a_bin_of_a_continuous_schedule():
    n = 3000
    drawn = draw(Contributing(), Linear(), n, torch.full((n,), 0.4))
    places = (Linear().rank(drawn) * 1000 % 1).sort().values
    assert float((places - torch.arange(n) / n).abs().max()) < 1.95 / math.sqrt(n)


@every_kind
@pytest.mark.parametrize("uniform", [0.02, 0.1, 1.0])
def test_the_weights_lie_between_0_and_1_over_uniform_and_have_a_mean_of_1(schedule, uniform):
    sampler, n = Contributing(uniform=uniform), 1000
    for t in levels(schedule, 0.0005, 0.9995):
        weight = sampler.weight(schedule, t.expand(n), draw(sampler, schedule, n, t.expand(n)))
        assert bool(((weight > 0) & (weight <= 1 / uniform)).all())
        error = float(weight.std()) / math.sqrt(n)
        assert float(weight.mean()) == pytest.approx(1, abs=4.5 * error + 1e-12)


def test_a_wholly_uniform_contributing_is_uniform():
    sampler = Contributing(uniform=1.0)
    for schedule in ALL.values():
        t = middle(schedule, 500)
        drawn = draw(sampler, schedule, 500, t)
        assert torch.equal(sampler.weight(schedule, t, drawn), torch.ones(500, dtype=torch.float64))
    assert abs(chi_square(draw(sampler, SHORT, t=middle(SHORT)).bincount(minlength=12).double())) < 5


@pytest.mark.parametrize("schedule", [SHORT, Discrete.linear(steps=2), Discrete.cosine(steps=50).zero_terminal_snr()])
@given(seed=st.integers(0, 99), uniform=st.floats(0.01, 1))
def test_the_weighted_mean_of_any_function_of_t_prime_is_its_uniform_mean(schedule, seed, uniform):
    """Exactly: the sum over all t' of q w f, with q by hand and w of the package, is the mean of f."""
    count = len(schedule.grid())
    function = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).exp()
    for t in schedule.grid()[:: max(1, count // 7)]:
        q = density(schedule, t, uniform)
        weight = Contributing(uniform=uniform).weight(schedule, t.expand(count), schedule.grid())
        assert float((q * weight * function).sum()) == pytest.approx(float(function.mean()), rel=1e-10)


@pytest.mark.parametrize("schedule", [Linear(), Linear(reverse=True), NARROW], ids=["flow", "reversed", "edm_narrow"])
def test_the_weighted_mean_of_functions_of_a_continuous_t_prime_is_the_uniform_one(schedule):
    """Over all that is drawn, its ends included."""
    sampler, n = Contributing(), 6000
    plain = schedule.rank(draw(Uniform(), schedule, seed=1))
    for t in levels(schedule, 0.32, 0.78, 2):
        drawn = draw(sampler, schedule, n, t.expand(n))
        weight, rank = sampler.weight(schedule, t.expand(n), drawn), schedule.rank(drawn)
        for function in (lambda r: r, lambda r: (10 * r).sin(), lambda r: (r < 0.301) * 1.0, lambda r: (r > 0.8) * 1.0):
            weighted, expected = weight * function(rank), function(plain)
            error = math.hypot(float(weighted.std()) / math.sqrt(n), float(expected.std()) / math.sqrt(COUNT))
            assert float(weighted.mean()) == pytest.approx(float(expected.mean()), abs=4.5 * error)


def test_each_sample_of_a_batch_has_the_density_of_its_own_t():
    t = torch.tensor([0, 5, 11, 5])
    t_prime = torch.tensor([3, 3, 3, 7])
    together = Contributing().weight(SHORT, t, t_prime)
    alone = torch.cat([Contributing().weight(SHORT, t[i : i + 1], t_prime[i : i + 1]) for i in range(4)])
    assert torch.equal(together, alone)
    assert len(set(together.tolist())) == 4
    drawn = torch.stack([draw(Contributing(), SHORT, 2, torch.tensor([0, 11]), seed) for seed in range(400)]).double()
    assert float(drawn[:, 0].mean()) > 7
    assert float(drawn[:, 1].mean()) < 4


def test_contributing_works_on_a_batch_of_one_and_a_schedule_of_one_time():
    assert draw(Contributing(), TABLE, 1, torch.tensor([500])).shape == (1,)
    one = Discrete(torch.tensor([0.5]))
    t = torch.zeros(3, dtype=torch.int64)
    assert draw(Contributing(), one, 3, t).tolist() == [0, 0, 0]
    assert Contributing().weight(one, t, t).tolist() == [1, 1, 1]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
def test_contributing_does_not_depend_on_the_default_dtype(default):
    t, schedule = torch.arange(1000), Discrete.scaled_linear()
    drawn = draw(Contributing(), schedule, 1000, t)
    weight = Contributing().weight(schedule, t, drawn)
    torch.set_default_dtype(default)
    try:
        again = draw(Contributing(), schedule, 1000, t)
        weight_again = Contributing().weight(schedule, t, again)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, drawn)
    assert torch.equal(weight_again, weight)


class NoFloat64(TorchDispatchMode):
    """What a device without float64 would do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        if isinstance(given, torch.Tensor) and given.dtype == torch.float64:
            raise TypeError(f"{func} gives float64")
        return given


FRESH = {
    "table": Discrete.scaled_linear, "flow": Linear, "cosine": Cosine, "edm": EDM,
    "sit": lambda: Interpolant(lambda t: t, lambda t: 1 - t),
}  # fmt: skip


@pytest.mark.parametrize("make", FRESH.values(), ids=FRESH)
def test_contributing_needs_no_float64_on_a_device_without(make, monkeypatch):
    precise, n = make(), 2000
    t = middle(precise, n)
    at_uniform = draw(Uniform(), precise, n)
    expected = Contributing().weight(precise, t, at_uniform)
    schedule = make()
    for module in (schedules, timesteps):
        monkeypatch.setattr(module, "NO_FLOAT64", ("cpu",))
    if schedule.discrete:
        schedule(t)  # its table comes from the CPU, where it is float64
    with NoFloat64():
        drawn = draw(Contributing(), schedule, n, t)
        weight = Contributing().weight(schedule, t, drawn)
        weight_at_uniform = Contributing().weight(schedule, t, at_uniform)
    assert weight.dtype == torch.float32
    schedule.check("t_prime", drawn, n)
    assert float(weight.mean()) == pytest.approx(1, abs=4.5 * float(weight.std()) / math.sqrt(n))
    apart = (weight_at_uniform - expected).abs() > 1e-3 * expected
    assert float(apart.double().mean()) < 0.01, "all but times at the edge of their bin have the same weight"


@every_kind
def test_contributing_waits_for_no_value_on_the_device(schedule):
    """Tensors without values: whatever would have to read one, and so to wait for the device, raises."""
    t = middle(schedule, 4).to("meta")
    drawn = Contributing()(schedule, torch.zeros(4, device="meta"), t=t)
    assert drawn.shape == Contributing().weight(schedule, t, drawn).shape == (4,)


def test_contributing_keeps_nothing_and_compares_by_value():
    sampler = Contributing(uniform=0.2)
    draw(sampler, TABLE, 4, middle(TABLE, 4))
    assert sampler == copy.deepcopy(sampler) == pickle.loads(pickle.dumps(sampler)) == Contributing(uniform=0.2)
    assert hash(sampler) == hash(Contributing(uniform=0.2))
    assert vars(sampler) == {"uniform": 0.2}


class Given(Contributing):
    """Contributing with the draw laid down, so that every t' can be gone through."""

    def __call__(self, schedule, like, /, *, t=None, generator=None):
        return self.times

    def of(self, times):
        object.__setattr__(self, "times", times)
        return self


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("mse_weight", [0.0, 0.5])
@pytest.mark.parametrize("weight", ["none", "min_snr"])
def test_the_expected_gradient_under_contributing_is_that_under_uniform(micro_batch, mse_weight, weight):
    """The exact expectation over t': each of its values once, times its probability, by hand."""
    model = ConvNet().double()
    sampler = Given()
    objective = PaperObjective.wrap(
        model, SHORT, prediction="v_prediction", layers="body", t_prime=sampler, distance="normalised",
        mse_weight=mse_weight, weight=weight, micro_batch=micro_batch,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # the student leaves its teacher
    t = torch.tensor([0, 4, 8, 11])
    clean, noise = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    q = torch.stack([density(SHORT, time) for time in t])

    def expectation(probability, **given):
        model.zero_grad()
        loss, terms = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for index in range(12):
            t_prime = torch.full((4,), index)
            sampler.of(t_prime)
            predicted = model(objective.add_noise(clean, noise, t), t)
            more = {"t_prime": t_prime} if given["uniform"] else {}
            each = objective.loss(predicted, clean=clean, noise=noise, t=t, reduction="none", **more)
            (probability[:, index] * each).sum().backward()
            loss += probability[:, index] * each.detach()
            terms += probability[:, index] * objective.terms["sp"]
        return loss, terms, torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = expectation(torch.full((4, 12), 1 / 12, dtype=torch.float64), uniform=True)
    actual = expectation(q, uniform=False)
    unweighted = expectation(q, uniform=True)
    for one, other, wrong in zip(actual, expected, unweighted, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-6
        assert float((wrong - other).norm() / other.norm()) > 1e-2, "weights of 1 would pass as well"


def test_contributing_by_name_is_weighted_and_drawn_by_the_objective():
    model = ConvNet()
    objective = PaperObjective.wrap(
        model, SHORT, prediction="v_prediction", layers="body", t_prime="contributing", seed=0
    )
    t, (clean, noise) = torch.arange(12), torch.randn(2, 12, 3, 5, 5)
    predicted = torch.randn(12, 3, 5, 5)
    generator = torch.Generator().manual_seed(0)
    drawn = Contributing()(SHORT, clean, t=t, generator=torch.Generator().manual_seed(0))
    keywords = {"clean": clean, "noise": noise, "t": t, "reduction": "none"}
    given = objective.loss(predicted, t_prime=drawn, **keywords)
    own = objective.loss(predicted, generator=generator, **keywords)
    torch.testing.assert_close(own, given * Contributing().weight(SHORT, t, drawn).float())


@pytest.mark.parametrize("mean", [math.nan, math.inf, -math.inf, "0", None])
def test_a_mean_that_is_no_finite_number_is_refused(mean):
    with pytest.raises(ValueError, match=rf"^`mean` is {mean!r}, expected a number\.$"):
        LogitNormal(mean=mean)


@pytest.mark.parametrize("uniform", [0.0, -0.1, 1.01, math.nan, math.inf, "0.1", None])
def test_a_uniform_part_that_gives_no_finite_weights_is_refused(uniform):
    with pytest.raises(ValueError, match=r"`uniform` is .*, expected a number above 0 and at most 1"):
        Contributing(uniform=uniform)


# All of them


@every
@samplers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_times_are_int64_on_tables_and_float32_elsewhere_and_valid(schedule, sampler, dtype):
    like = torch.zeros(64, 3, 2, dtype=dtype)
    t = sampler(schedule, like, t=middle(schedule, 64), generator=torch.Generator().manual_seed(0))
    assert t.dtype == (torch.int64 if schedule.discrete else torch.float32)
    schedule.check("t_prime", t, 64, like.device)


@every
@samplers
def test_only_the_given_generator_is_drawn_from(schedule, sampler):
    """The student's dropout must not see that t' is drawn."""
    before, generator = torch.get_rng_state(), torch.Generator().manual_seed(0)
    first_state = generator.get_state()
    sampler(schedule, torch.zeros(8), t=middle(schedule, 8), generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(generator.get_state(), first_state)


@every
@samplers
def test_a_draw_is_reproducible_and_differs_between_seeds_and_calls(schedule, sampler):
    t, like = middle(schedule, 32), torch.zeros(32)
    assert torch.equal(draw(sampler, schedule, 32, t), draw(sampler, schedule, 32, t))
    assert not torch.equal(draw(sampler, schedule, 32, t, seed=0), draw(sampler, schedule, 32, t, seed=1))
    generator = torch.Generator().manual_seed(0)
    calls = [sampler(schedule, like, t=t, generator=generator) for _ in range(2)]
    assert not torch.equal(*calls)


@every
@samplers
def test_an_empty_batch_draws_no_times(schedule, sampler):
    assert draw(sampler, schedule, 0, t=middle(schedule, 0)).shape == (0,)


@pytest.mark.parametrize("sampler", [Near(), Shifted(), Contributing()], ids=["near", "shifted", "contributing"])
def test_float_indices_serve_as_well_as_int_ones(sampler):
    t = torch.tensor([100, 500, 900])
    assert torch.equal(draw(sampler, TABLE, 3, t=t.float()), draw(sampler, TABLE, 3, t=t))


def test_a_draw_is_its_formula_of_the_generators_numbers():
    """A saved generator gives the same times in the next version, too."""
    kind, t = {"dtype": torch.float64, "generator": None}, torch.full((8,), 0.5)
    uniform, normal = (
        function(8, **kind | {"generator": torch.Generator().manual_seed(0)}) for function in (torch.rand, torch.randn)
    )
    expected = {
        Uniform(): uniform,
        Uniform(shift=3.0): 3 * uniform / (1 + 2 * uniform),
        Uniform(low=0.2, high=0.6): 0.2 + 0.4 * uniform,
        LogitNormal(mean=0.3, std=0.7): torch.sigmoid(0.3 + 0.7 * normal),
        Near(std=50): 0.5 + 0.05 * normal,
        Shifted(by=50): 0.5 + torch.where(uniform < 0.5, -0.05, 0.05),
    }
    for sampler, times in expected.items():
        drawn = draw(sampler, Linear(), 8, t=t)
        assert torch.equal(drawn, times.float()) or torch.allclose(drawn.double(), times, rtol=2e-7, atol=0)


def test_a_logit_normal_shift_may_depend_on_the_clean_sample():
    like = torch.zeros(8, 3)
    by_hand, asked = (
        LogitNormal(shift=shift)(Linear(), like, generator=torch.Generator().manual_seed(0))
        for shift in (3.0, lambda clean: float(clean.shape[1]))
    )
    assert torch.equal(by_hand, asked)


@pytest.mark.parametrize("name", ["near", "shifted", "contributing"])
def test_a_sampler_relative_to_t_cannot_draw_t_itself(name):
    with pytest.raises(ValueError, match=rf"'{name}' .*relative to t.*'uniform' or 'logit_normal'"):
        draw(timesteps.NAMED[name], TABLE, 4)


@pytest.mark.parametrize("sampler", ["near", "shifted", "contributing", Near(), Contributing(uniform=0.5)])
def test_a_sampler_relative_to_t_is_refused_for_t(sampler):
    with pytest.raises(ValueError, match=r"`t` is .*places t' relative to t. Use 'uniform' or 'logit_normal' for t"):
        timesteps.get("t", sampler)
    assert timesteps.get("t_prime", sampler) == timesteps.NAMED.get(str(sampler), sampler)


# Names


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("uniform", Uniform),
        ("near", Near),
        ("shifted", Shifted),
        ("logit_normal", LogitNormal),
        ("contributing", Contributing),
    ],
)
def test_get_gives_the_sampler_of_a_name(name, kind):
    assert timesteps.get("t_prime", name) == kind()


def test_get_passes_a_callable_through():
    def mine(schedule, like, *, t, generator):
        return t

    assert timesteps.get("t", mine) is mine


KNOWN = "expected one of 'uniform', 'near', 'shifted', 'logit_normal', 'contributing', or a callable"
ALSO_CLEAN = "; or 'clean', which compares the clean estimates themselves"


@pytest.mark.parametrize(("name", "more"), [("t", ""), ("t_prime", ALSO_CLEAN)])
def test_an_unknown_name_lists_the_known_ones(name, more):
    with pytest.raises(ValueError, match="unknown") as error:
        timesteps.get(name, "gaussian")
    assert str(error.value) == f"unknown `{name}` 'gaussian', {KNOWN}{more}."


@pytest.mark.parametrize(("name", "more"), [("t", ""), ("t_prime", ALSO_CLEAN)])
@pytest.mark.parametrize("value", [3, None, ("uniform",), Uniform])
def test_what_is_neither_a_name_nor_callable_is_refused(value, name, more):
    with pytest.raises(TypeError) as error:
        timesteps.get(name, value)
    assert str(error.value) == f"`{name}` is {value!r}, {KNOWN}{more}."


def test_clean_is_for_t_prime_only():
    assert timesteps.get("t_prime", "clean") == Clean() == timesteps.get("t_prime", Clean())
    with pytest.raises(ValueError, match="unknown `t` 'clean'"):
        timesteps.get("t", "clean")
    with pytest.raises(ValueError, match="is 'clean'") as error:
        timesteps.get("t", Clean())
    assert str(error.value) == (
        "`t` is 'clean', where there is nothing to denoise; it is for t' only. Use 'uniform' or 'logit_normal' for t."
    )


def test_within_narrows_a_sampler_of_the_package_and_keeps_the_rest_of_it():
    narrowed = timesteps.within(LogitNormal(mean=1.0, shift=2.0), 0.1, 0.9)
    assert narrowed == LogitNormal(mean=1.0, shift=2.0, low=0.1, high=0.9)


def test_within_keeps_the_narrower_end():
    assert timesteps.within(Uniform(low=0.2, high=0.8), 0.1, 0.9) == Uniform(low=0.2, high=0.8)
    assert timesteps.within(Uniform(low=0.2, high=0.8), 0.3, 0.7) == Uniform(low=0.3, high=0.7)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clean_draws_the_clean_end(schedule, dtype):
    first, last = schedule.drawn
    drawn = Clean()(schedule, torch.zeros(3, 2, dtype=dtype))
    assert drawn.dtype == (torch.int64 if schedule.discrete else torch.float32)
    torch.testing.assert_close(drawn.double(), torch.full((3,), first, dtype=torch.float64))
    assert Clean()(Linear(reverse=True), torch.zeros(3)).tolist() == [1, 1, 1]
    assert last > first


def test_within_leaves_a_callable_alone():
    def mine(schedule, like, *, t, generator):
        return t

    assert timesteps.within(mine, 0.1, 0.9) is mine


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Uniform(shift=0.0), "`shift` is 0.0"),
        (lambda: Uniform(shift=-1.0), "`shift` is -1.0"),
        (lambda: LogitNormal(std=0.0), "`std` is 0.0"),
        (lambda: Near(std=-1.0), "`std` is -1.0"),
        (lambda: Shifted(by=float("nan")), "`by` is nan"),
        (lambda: Shifted(by=math.inf), "`by` is inf"),
        (lambda: draw(Uniform(shift=lambda clean: 0.0), TABLE), "`shift` is 0.0"),
        (lambda: draw(Uniform(low=2000), TABLE), "expected 0 <= low <= high <= 999"),
        (lambda: draw(Uniform(low=20, high=10), TABLE), "`low` is 20 and `high` 10"),
        (lambda: draw(Uniform(low=100, high=200), EDM()), "expected 0.002 <= low <= high <= 80"),
    ],
)
def test_a_sampler_that_could_draw_nothing_is_refused(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


@pytest.mark.parametrize("steps", [2, 10, 24])
def test_shifted_leaves_t_also_on_a_short_table(steps):
    schedule = Discrete.linear(steps=steps)
    t = torch.arange(steps)
    t_prime = Shifted()(schedule, t.float(), t=t)
    assert bool((t_prime != t).all())
