"""Samplers of t and t': their distributions, ends, dtype, and where their randomness comes from."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perceptual_diffusion import timesteps
from perceptual_diffusion.schedules import EDM, Cosine, Discrete, Interpolant, Linear
from perceptual_diffusion.timesteps import LogitNormal, Near, Shifted, Uniform

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


@pytest.mark.parametrize("sampler", [Near(), Shifted()], ids=["near", "shifted"])
def test_float_indices_serve_as_well_as_int_ones(sampler):
    t = torch.tensor([100, 500, 900])
    assert torch.equal(draw(sampler, TABLE, 3, t=t.float()), draw(sampler, TABLE, 3, t=t))


@pytest.mark.parametrize("name", ["near", "shifted"])
def test_a_sampler_relative_to_t_cannot_draw_t_itself(name):
    with pytest.raises(ValueError, match=rf"'{name}' .*relative to t.*'uniform' or 'logit_normal'"):
        draw(timesteps.NAMED[name], TABLE, 4)


# Names


@pytest.mark.parametrize(
    ("name", "kind"), [("uniform", Uniform), ("near", Near), ("shifted", Shifted), ("logit_normal", LogitNormal)]
)
def test_get_gives_the_sampler_of_a_name(name, kind):
    assert timesteps.get("t_prime", name) == kind()


def test_get_passes_a_callable_through():
    def mine(schedule, like, *, t, generator):
        return t

    assert timesteps.get("t", mine) is mine


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown `t_prime` 'gaussian'") as error:
        timesteps.get("t_prime", "gaussian")
    for name in ("uniform", "near", "shifted", "logit_normal"):
        assert repr(name) in str(error.value)


@pytest.mark.parametrize("value", [3, None, ("uniform",)])
def test_what_is_neither_a_name_nor_callable_is_refused(value):
    with pytest.raises(TypeError, match=r"`t` is .*'uniform'.*or a callable"):
        timesteps.get("t", value)


def test_within_narrows_a_sampler_of_the_package_and_keeps_the_rest_of_it():
    narrowed = timesteps.within(LogitNormal(mean=1.0, shift=2.0), 0.1, 0.9)
    assert narrowed == LogitNormal(mean=1.0, shift=2.0, low=0.1, high=0.9)


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
