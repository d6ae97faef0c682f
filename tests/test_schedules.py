"""Schedules: SNR, ends, derivatives, ranks, the checks of t, and what the constructors refuse."""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perceptual_diffusion import schedules
from perceptual_diffusion.schedules import EDM, Cosine, Discrete, Interpolant, Linear, Schedule, precise

SCHEDULES = {
    "scaled_linear": Discrete.scaled_linear(),
    "linear": Discrete.linear(),
    "cosine_table": Discrete.cosine(),
    "zero_terminal_snr": Discrete.scaled_linear().zero_terminal_snr(),
    "flow": Linear(),
    "flow_shift_3": Linear(3.0),
    "flow_scale_1000": Linear(scale=1000),
    "flow_shift_3_scale_1000": Linear(3.0, scale=1000),
    "cosine": Cosine(),
    "edm": EDM(),
    "interpolant": Interpolant(lambda t: 1 - t, lambda t: t),
    "interpolant_curved": Interpolant(lambda t: torch.ones_like(t), lambda t: t**2 + t, low=0.5, high=3.0),
    "sit": Interpolant(lambda t: t, lambda t: 1 - t),
    "reversed": Linear(reverse=True),
    "reversed_shift_3_scale_1000": Linear(3.0, scale=1000, reverse=True),
}
DATA_AT_THE_END = {"sit", "reversed", "reversed_shift_3_scale_1000"}
CONTINUOUS = [name for name, schedule in SCHEDULES.items() if not schedule.discrete]
DISCRETE = [name for name, schedule in SCHEDULES.items() if schedule.discrete]
RELATIVE = 1e-9
"""Error of a formula evaluated in float64."""

every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
continuous = pytest.mark.parametrize("schedule", [SCHEDULES[n] for n in CONTINUOUS], ids=CONTINUOUS)
discrete = pytest.mark.parametrize("schedule", [SCHEDULES[n] for n in DISCRETE], ids=DISCRETE)


@contextmanager
def refused(error, words):
    """The block raises `error`, and its message holds every one of the words."""
    with pytest.raises(error) as caught:
        yield
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def ends(schedule):
    """The first and the last time in use, shape (2,)."""
    return schedule.at(torch.tensor([0.0, 1.0], dtype=torch.float64))


def times(schedule, count=401):
    return schedule.at(torch.linspace(0, 1, count, dtype=torch.float64))


# Scales


@pytest.mark.parametrize("name", SCHEDULES)
def test_snr_falls_toward_the_noise(name):
    schedule = SCHEDULES[name]
    t = torch.arange(1000) if schedule.discrete else times(schedule)
    alpha, sigma = schedule(t)
    angle = torch.atan2(sigma, alpha)  # grows exactly where alpha² / sigma² falls, also where one of them is 0
    steps = angle.diff() if name not in DATA_AT_THE_END else -angle.diff()
    assert (steps > 0).all()
    assert angle.min() >= 0
    assert angle.max() <= math.pi / 2


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("flow", (1, 0), (0, 1)),
        ("flow_shift_3", (1, 0), (0, 1)),
        ("flow_scale_1000", (1, 0), (0, 1)),
        ("flow_shift_3_scale_1000", (1, 0), (0, 1)),
        ("cosine", (1, 0), (0, 1)),
        ("edm", (1, 0.002), (1, 80)),
        ("interpolant", (1, 0), (0, 1)),
        ("interpolant_curved", (1, 0.75), (1, 12)),
        ("sit", (0, 1), (1, 0)),
        ("reversed", (0, 1), (1, 0)),
        ("reversed_shift_3_scale_1000", (0, 1), (1, 0)),
        ("scaled_linear", (math.sqrt(1 - 0.00085), math.sqrt(0.00085)), None),
        ("linear", (math.sqrt(1 - 1e-4), math.sqrt(1e-4)), None),
        ("zero_terminal_snr", None, (0, 1)),
    ],
)
def test_scales_at_both_ends(name, first, last):
    alpha, sigma = SCHEDULES[name](ends(SCHEDULES[name]))
    for at, expected in ((0, first), (1, last)):
        if expected is not None:
            whole = all(float(e).is_integer() for e in expected)
            tolerance = 0 if whole else RELATIVE  # 0 and 1 are exact: nothing of the other part is left
            assert float(alpha[at]) == pytest.approx(expected[0], rel=tolerance, abs=0)
            assert float(sigma[at]) == pytest.approx(expected[1], rel=tolerance, abs=0)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int64, torch.int32])
def test_scales_are_float64_and_finite_at_every_time(schedule, dtype):
    t = (torch.arange(1000) if schedule.discrete else times(schedule)).to(dtype)
    for scale in schedule(t):
        assert scale.dtype == torch.float64
        assert scale.shape == t.shape
        assert scale.isfinite().all()


@every
def test_scales_do_not_depend_on_the_dtype_of_the_time(schedule):
    t = torch.tensor([1, 2] if schedule.high > 2 else [0, 1])
    for dtype in (torch.float64, torch.float32, torch.float16):
        for scale, expected in zip(schedule(t.to(dtype)), schedule(t), strict=True):
            assert torch.equal(scale, expected)


@every
def test_an_empty_batch_of_times_gives_empty_scales(schedule):
    for scale in schedule(torch.zeros(0)):
        assert scale.shape == (0,)


@discrete
def test_a_table_is_variance_preserving(schedule):
    alpha, sigma = schedule(torch.arange(1000))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64), rtol=1e-15, atol=0)


def test_the_cosine_path_is_variance_preserving():
    alpha, sigma = Cosine()(times(Cosine()))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=1e-15, atol=0)


# Tables, each against a recomputation in numpy


def numpy_alpha_bar(betas):
    return np.cumprod(1 - betas)


@pytest.mark.parametrize(
    ("table", "betas"),
    [
        (Discrete.scaled_linear, np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
        (Discrete.linear, np.linspace(1e-4, 0.02, 1000)),
        (lambda: Discrete.linear(0.001, 0.3, steps=7), np.linspace(0.001, 0.3, 7)),
        (lambda: Discrete.scaled_linear(0.001, 0.3, steps=7), np.linspace(0.001**0.5, 0.3**0.5, 7) ** 2),
        (lambda: Discrete.from_betas(torch.tensor([0.5, 0.25])), np.array([0.5, 0.25])),
    ],
)
def test_a_table_is_the_cumulative_product_of_its_betas(table, betas):
    np.testing.assert_allclose(table().alpha_bar.numpy(), numpy_alpha_bar(betas), rtol=1e-12)


def test_the_cosine_table_is_that_of_nichol_and_dhariwal():
    """Eq. 17: ᾱ_t = f(t) / f(0), f(t) = cos²((t/T + s)/(1 + s) π/2), β clipped at 0.999."""
    t = np.arange(1001) / 1000
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    table = Discrete.cosine().alpha_bar.numpy()
    np.testing.assert_allclose(table[:-1], (f / f[0])[1:-1], rtol=1e-9)
    assert table[-1] == pytest.approx(table[-2] * 0.001, rel=1e-9)  # the clip binds at the last step, where f is 0


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine_table"])
def test_zero_terminal_snr_is_algorithm_1_of_lin_et_al_2024(name):
    rescaled = SCHEDULES[name].zero_terminal_snr().alpha_bar.numpy()
    # the authors' listing, which goes by way of betas
    alphas_bar_sqrt = np.sqrt(SCHEDULES[name].alpha_bar.numpy())
    alphas_bar_sqrt_0, alphas_bar_sqrt_t = alphas_bar_sqrt[0], alphas_bar_sqrt[-1]
    alphas_bar_sqrt = alphas_bar_sqrt - alphas_bar_sqrt_t
    alphas_bar_sqrt = alphas_bar_sqrt * alphas_bar_sqrt_0 / (alphas_bar_sqrt_0 - alphas_bar_sqrt_t)
    alphas_bar = alphas_bar_sqrt**2
    betas = 1 - np.concatenate([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])
    np.testing.assert_allclose(rescaled[:-1], numpy_alpha_bar(betas)[:-1], rtol=1e-8)
    assert rescaled[-1] == 0
    assert rescaled[0] == pytest.approx(float(SCHEDULES[name].alpha_bar[0]), rel=1e-14)


def test_zero_terminal_snr_can_be_applied_twice():
    once = Discrete.linear().zero_terminal_snr()
    torch.testing.assert_close(once.zero_terminal_snr().alpha_bar, once.alpha_bar, rtol=1e-14, atol=0)


def test_a_single_timestep_has_no_terminal_snr():
    with pytest.raises(ValueError, match="one timestep"):
        Discrete(torch.tensor([0.5])).zero_terminal_snr()


def test_edm_takes_every_sigma_from_a_millionth_to_a_million():
    assert (EDM().low, EDM().high) == (1e-6, 1e6)


def test_a_table_of_two_timesteps_can_end_in_noise():
    assert Discrete(torch.tensor([0.5, 0.25])).zero_terminal_snr().alpha_bar.tolist() == pytest.approx([0.5, 0])


def test_a_table_is_its_own_copy():
    given_table = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    schedule = Discrete(given_table)
    given_table[0] = 0.2
    assert float(schedule(torch.tensor([0]))[0]) == pytest.approx(math.sqrt(0.9))


def test_the_repr_names_zero_terminal_snr():
    assert "zero terminal SNR" in repr(SCHEDULES["zero_terminal_snr"])
    assert "zero terminal SNR" not in repr(SCHEDULES["scaled_linear"])


# Derivatives


@continuous
def test_the_derivative_is_autograds(schedule):
    t = times(schedule)[1:-1].requires_grad_()
    for scale, slope in zip(schedule(t), schedule.derivative(t), strict=True):
        expected = torch.zeros_like(t)
        if scale.requires_grad:
            (expected,) = torch.autograd.grad(scale.sum(), t, retain_graph=True)
        assert slope.dtype == torch.float64
        torch.testing.assert_close(slope.detach(), expected, rtol=RELATIVE, atol=1e-15)


@continuous
def test_the_derivative_is_finite_and_without_a_graph_at_both_ends(schedule):
    for slope in schedule.derivative(ends(schedule)):
        assert slope.isfinite().all()
        assert not slope.requires_grad


def test_the_derivative_of_an_interpolant_works_under_no_grad():
    with torch.no_grad():
        alpha, sigma = SCHEDULES["interpolant_curved"].derivative(torch.tensor([1.0]))
    assert float(alpha) == 0
    assert float(sigma) == pytest.approx(3.0)


@discrete
def test_a_table_has_no_derivative_and_says_what_to_use(schedule):
    with pytest.raises(ValueError, match=r"discrete.*v_prediction"):
        schedule.derivative(torch.tensor([1]))


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_the_velocity_of_the_straight_path_is_noise_minus_clean_whatever_the_shift(shift):
    for scale in (1.0, 1000.0):
        a, b = Linear(shift, scale=scale).velocity(torch.tensor([0.0, 0.3, 1.0]) * scale)
        assert (a == -1).all()
        assert (b == 1).all()


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_the_velocity_of_the_reversed_path_is_noise_minus_clean_too(shift):
    a, b = Linear(shift, scale=1000, reverse=True).velocity(torch.tensor([0.0, 300.0, 1000.0]))
    assert (a == -1).all()
    assert (b == 1).all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@given(t=st.floats(0, 1))
def test_a_reversed_path_is_the_path_backward(shift, t):
    forward, backward = Linear(shift, scale=1000), Linear(shift, scale=1000, reverse=True)
    t = torch.tensor([1000 * t], dtype=torch.float64)
    for ours, theirs in zip(backward(t), forward(1000 - t), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(backward.derivative(t), forward.derivative(1000 - t), strict=True):
        torch.testing.assert_close(ours, -theirs, rtol=1e-12, atol=0)


def test_the_repr_of_a_reversed_path_builds_it_again():
    for schedule in (Linear(3.0, scale=1000), Linear(3.0, scale=1000, reverse=True)):
        twin = eval(repr(schedule), {"Linear": Linear})
        assert vars(twin) == vars(schedule)


# Which end is the noise, and how far a time is from it


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_first_says_at_which_end_the_noise_is(name):
    assert SCHEDULES[name].noise_first is (name in DATA_AT_THE_END)


def test_a_single_timestep_has_its_noise_last():
    assert Discrete(torch.tensor([0.5])).noise_first is False


def test_noise_first_of_a_schedule_of_the_users_own_is_found_from_its_scales():
    class Own(Schedule):
        low, high = -3.0, 3.0

        def __call__(self, t):
            return torch.sigmoid(precise(t)).sqrt(), torch.sigmoid(-precise(t)).sqrt()

        def derivative(self, t):
            raise NotImplementedError

    assert Own().noise_first is True  # t is the log-SNR
    assert Own().level(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("name", "t", "level"),
    [
        ("flow", [0, 0.25, 1], [0, 0.25, 1]),
        ("flow_scale_1000", [0, 250, 1000], [0, 0.25, 1]),
        ("flow_shift_3_scale_1000", [0, 250, 1000], [0, 0.25, 1]),
        ("reversed", [0, 0.25, 1], [1, 0.75, 0]),
        ("reversed_shift_3_scale_1000", [0, 250, 1000], [1, 0.75, 0]),
        ("cosine", [0, 0.25, 1], [0, 0.25, 1]),
        ("sit", [0, 0.25, 1], [1, 0.75, 0]),
        ("interpolant_curved", [0.5, 3.0], [0, 1]),
        ("linear", [0, 250, 999], [0, 0.25, 0.999]),  # pipelines divide by T
    ],
)
def test_the_level_of_a_time_is_its_place_between_clean_and_noise(name, t, level):
    given = SCHEDULES[name].level(torch.tensor(t))
    assert given.dtype == torch.float64
    torch.testing.assert_close(given, torch.tensor(level, dtype=torch.float64), rtol=1e-15, atol=0)


@every
def test_the_level_rises_with_the_noise(schedule):
    if isinstance(schedule, EDM):
        return
    t = torch.arange(1000) if schedule.discrete else times(schedule)
    alpha, sigma = schedule(t)
    order = schedule.level(t).argsort()
    assert (torch.atan2(sigma, alpha)[order].diff() > 0).all()


def test_a_sigma_has_no_level():
    with pytest.raises(ValueError, match=r"time of an EDM schedule is sigma, which has no level"):
        EDM().level(torch.tensor([1.0]))


def test_the_shift_is_that_of_esser_et_al():
    """Eq. 23: s = shift u / (1 + (shift − 1) u)."""
    u = np.linspace(0, 1, 11)
    _, sigma = Linear(3.0, scale=1000)(torch.from_numpy(1000 * u))
    np.testing.assert_allclose(sigma.numpy(), 3 * u / (1 + 2 * u), rtol=1e-14)


# Ranks


@every
@given(fraction=st.floats(0, 1))
def test_the_time_at_the_rank_of_a_time_is_that_time(schedule, fraction):
    low, high = (float(t) for t in ends(schedule))
    t = torch.tensor([low + fraction * (high - low)], dtype=torch.float64)
    t = t.round().long() if schedule.discrete else t
    back = schedule.at(schedule.rank(t))
    assert back.dtype == t.dtype
    torch.testing.assert_close(back, t, rtol=1e-8, atol=1e-12)


@every
@given(rank=st.floats(0.001, 0.999))
def test_the_rank_of_the_time_at_a_rank_is_that_rank(schedule, rank):
    rank = torch.tensor([rank], dtype=torch.float64)
    back = schedule.rank(schedule.at(rank))
    atol = (
        0.5 / len(schedule.alpha_bar) + 1e-12 if schedule.discrete else 1e-12
    )  # an index stands for its step's middle
    if isinstance(schedule, EDM):
        bottom, top = schedule.rank(torch.tensor([0.002, 80.0], dtype=torch.float64)).tolist()
        rank = rank.clamp(bottom, top)
    torch.testing.assert_close(back, rank, rtol=1e-9, atol=atol)


@discrete
def test_every_index_has_as_large_a_share_of_the_ranks(schedule):
    t = schedule.at((torch.arange(5000, dtype=torch.float64) + 0.5) / 5000)
    assert (t.bincount(minlength=1000) == 5).all()


def test_edm_ranks_follow_the_training_distribution():
    """ln sigma ~ N(−1.2, 1.2²) of Karras et al. 2022: the median is exp(−1.2), one std up is the rank 0.8413."""
    rank = EDM().rank(torch.tensor([math.exp(-1.2), 1.0], dtype=torch.float64))
    torch.testing.assert_close(rank, torch.tensor([0.5, 0.8413447460685429], dtype=torch.float64))


@every
def test_the_ranks_of_the_whole_schedule_are_0_and_1(schedule):
    assert schedule.ranks() == (0.0, 1.0)


def test_the_ranks_of_a_table_hold_the_whole_steps_of_both_ends():
    first, last = SCHEDULES["linear"].ranks(10, 20)
    assert (first, last) == (pytest.approx(0.010), pytest.approx(0.021))


def test_the_ranks_of_a_continuous_schedule_are_not_rounded_to_float32():
    assert Linear().ranks(0.7, 0.9) == (pytest.approx(0.7, abs=1e-15), pytest.approx(0.9, abs=1e-15))


# Checks of t


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int64])
def test_check_accepts_the_ends_in_every_dtype(schedule, dtype):
    first, last = (1, 80) if isinstance(schedule, EDM) else (schedule.low, schedule.high)
    if not dtype.is_floating_point and not float(first).is_integer():
        first = last
    schedule.check("t", torch.tensor([first, last]).to(dtype), 2, torch.device("cpu"))


@every
def test_check_accepts_an_empty_batch(schedule):
    schedule.check("t", torch.zeros(0), 0)


HALF = SCHEDULES["flow"]
TABLE = SCHEDULES["linear"]


@pytest.mark.parametrize(
    ("schedule", "t", "error", "words"),
    [
        (TABLE, 5, TypeError, ["`t`", "int 5", "tensor of shape (B,)"]),
        (TABLE, [1, 2], TypeError, ["`t`", "list", "tensor of shape (B,)"]),
        (TABLE, torch.tensor([999.0]).bfloat16(), TypeError, ["`t`", "bfloat16", "int64 or float32"]),
        (HALF, torch.tensor([0.5]).bfloat16(), TypeError, ["`t`", "bfloat16", "int64 or float32"]),
        (TABLE, torch.tensor([True]), TypeError, ["`t`", "torch.bool", "`t.float()`"]),
        (TABLE, torch.tensor([1j]), TypeError, ["`t`", "complex", "integer or float32"]),
        (TABLE, torch.tensor([float("nan")]), ValueError, ["`t`", "NaN", "from 0 to 999"]),
        (HALF, torch.tensor([0.5, float("nan")]), ValueError, ["`t`", "NaN", "from 0 to 1"]),
        (HALF, torch.tensor([float("inf")]), ValueError, ["`t`", "inf", "from 0 to 1"]),
        (TABLE, torch.tensor([5, -1]), ValueError, ["`t`", "-1", "from 0 to 999"]),
        (HALF, torch.tensor([-0.25]), ValueError, ["`t`", "-0.25", "from 0 to 1"]),
        (TABLE, torch.tensor([0, 1000]), ValueError, ["`t`", "1000", "from 0 to 999", "unit of time"]),
        (HALF, torch.tensor([999.0]), ValueError, ["`t`", "999", "from 0 to 1", "unit of time"]),
        (SCHEDULES["flow_scale_1000"], torch.tensor([1000.5]), ValueError, ["`t`", "1000.5", "from 0 to 1000"]),
        (SCHEDULES["edm"], torch.tensor([0.0]), ValueError, ["`t`", "sigma itself"]),
        (SCHEDULES["edm"], torch.tensor([-1.2]), ValueError, ["`t`", "-1.2", "not ln(sigma) / 4"]),
        (SCHEDULES["edm"], torch.tensor([0.0]).half(), ValueError, ["`t`", "sigma itself"]),
        (SCHEDULES["edm"], torch.tensor([float("inf")]).half(), ValueError, ["`t`", "inf", "sigma itself"]),
        (TABLE, torch.tensor([1.0, 0.5]), ValueError, ["`t`", "fraction", "`t.long()`"]),
    ],
)
def test_check_refuses_a_bad_time_and_names_the_mend(schedule, t, error, words):
    with refused(error, words):
        schedule.check("t", t)


@pytest.mark.parametrize(
    ("t", "words"),
    [
        (torch.zeros(4, 1, 1, 1), ["(4, 1, 1, 1)", "expected (4,)", "`t_prime.flatten()`"]),
        (torch.tensor(0.5), ["shape ()", "expected (4,)", "expand"]),
        (torch.zeros(2, 3), ["(2, 3)", "expected (4,)"]),
        (torch.zeros(3), ["(3,)", "expected (4,)", "one time per sample"]),
        (torch.zeros(1), ["(1,)", "expected (4,)", "one time per sample"]),
        (torch.zeros(4, device="meta"), ["meta", "expected cpu", "`t_prime.to("]),
    ],
)
def test_check_refuses_a_wrong_shape_batch_or_device(t, words):
    with refused(ValueError, ["`t_prime`", *words]):
        Linear().check("t_prime", t, 4, torch.device("cpu"))


def test_check_respects_a_narrower_range():
    TABLE.check("t", torch.tensor([10, 20]), low=10, high=20)
    for t in (9, 21):
        with pytest.raises(ValueError, match=f"holds {t}, expected times from 10 to 20"):
            TABLE.check("t", torch.tensor([t]), low=10, high=20)


@pytest.mark.parametrize("end", [0.1, 0.3, 0.7, 0.9])
def test_check_accepts_the_ends_of_a_narrower_range_in_float32(end):
    Linear().check("t", torch.tensor([end], dtype=torch.float32), low=end)
    Linear().check("t", torch.tensor([end], dtype=torch.float32), high=end)


EPS = torch.finfo(torch.float32).eps


def test_an_end_that_float32_rounds_away_is_accepted():
    Linear(scale=2).check("t", torch.tensor([1.0]), low=1 + 0.45 * EPS)
    Linear(scale=2).check("t", torch.tensor([1.0]), high=1 - 0.2 * EPS)
    Linear().check("t", torch.tensor([0.5]), low=0.5 + 0.2 * EPS)


@pytest.mark.parametrize("t", [0.5 - EPS / 2, 0.5 + EPS / 2, 0.5 - EPS, 0.5 + EPS])
def test_a_time_beyond_what_rounding_explains_is_refused(t):
    with pytest.raises(ValueError, match=r"expected times from 0\.5 to 0\.5"):
        Linear().check("t", torch.tensor([t]), low=0.5, high=0.5)


@every
def test_the_numbers_of_a_schedule_do_not_depend_on_the_default_device(schedule):
    expected = schedule.ranks(), schedule.noise_first, schedule.drawn, schedule.spacing
    with torch.device("meta"):
        assert (schedule.ranks(), schedule.noise_first, schedule.drawn, schedule.spacing) == expected


def test_a_range_of_one_time_has_ranks():
    assert Linear().ranks(0.5, 0.5) == (0.5, 0.5)
    assert Linear().ranks(0, 0) == (0, 0)
    assert Linear().ranks(1, 1) == (1, 1)
    assert TABLE.ranks(10, 10) == pytest.approx((0.010, 0.011))


@continuous
def test_the_grid_of_a_schedule_runs_from_end_to_end(schedule):
    grid, (first, last) = schedule.grid(), schedule.drawn
    assert grid.dtype == torch.float64
    assert grid.shape == (1001,)
    torch.testing.assert_close(grid[[0, -1]], torch.tensor([first, last], dtype=torch.float64), rtol=1e-12, atol=0)


# Constructors


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([0.5, 0.6], ["does not fall at t = 1", "strictly falling"]),
        ([0.9, 0.5, 0.5], ["does not fall at t = 2", "strictly falling"]),
        ([1.2, 0.5], ["leaves [0, 1]", "alphas_cumprod"]),
        ([0.5, -0.1], ["leaves [0, 1]", "alphas_cumprod"]),
        ([0.9, float("nan"), 0.1], ["NaN", "alphas_cumprod"]),
        ([], ["shape (0,)", "expected (T,)"]),
        ([[0.9, 0.5]], ["shape (1, 2)", "expected (T,)"]),
    ],
)
def test_discrete_refuses_a_bad_table(table, words):
    with refused(ValueError, ["`alpha_bar`", *words]):
        Discrete(torch.tensor(table))


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "3", None])
@pytest.mark.parametrize("name", ["shift", "scale"])
def test_linear_refuses_a_bad_number(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is .*expected a positive number"):
        Linear(**{name: value})


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_linear_refuses_a_direction_that_is_not_true_or_false(value):
    with pytest.raises(TypeError, match=r"`reverse` is .*expected True \(t = 0 is noise\) or False"):
        Linear(reverse=value)


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        ({"sigma_min": 0.0}, "sigma_min"),
        ({"sigma_min": -1.0}, "sigma_min"),
        ({"sigma_min": 80.0}, "sigma_min"),
        ({"sigma_min": float("nan")}, "sigma_min"),
        ({"sigma_max": 0.001}, "sigma_max"),
        ({"sigma_max": float("inf")}, "sigma_max"),
        ({"p_mean": float("nan")}, "p_mean"),
        ({"p_std": 0.0}, "p_std"),
        ({"p_std": float("inf")}, "p_std"),
    ],
)
def test_edm_refuses_bad_numbers(numbers, name):
    with pytest.raises(ValueError, match=f"`{name}` .*expected"):
        EDM(**numbers)


@pytest.mark.parametrize(
    ("alpha", "sigma", "words"),
    [
        (lambda t: (t - 0.5) ** 2 + 0.1, lambda t: torch.ones_like(t), ["signal-to-noise ratio", "monotone"]),
        (lambda t: torch.ones_like(t), lambda t: torch.ones_like(t), ["signal-to-noise ratio", "monotone"]),
        # the angle turns all along, yet the SNR falls to 0 half-way and rises again
        (lambda t: torch.cos(math.pi * t), lambda t: torch.sin(math.pi * t), ["signal-to-noise ratio", "monotone"]),
        (lambda t: 1 / t, lambda t: t, ["`alpha` is not finite at t = 0. Give finite scales from 0 to 1."]),
        (lambda t: 1 - t, lambda t: t.log(), ["`sigma` is not finite at t = 0. Give finite scales from 0 to 1."]),
        (lambda t: 1 - t, lambda t: 1.0, ["`sigma` gives float", "shape (B,)"]),
        (lambda t: (1 - t)[:, None], lambda t: t, ["`alpha` gives (1001, 1)", "shape (B,)"]),
        (lambda t: torch.ones(()), lambda t: t, ["`alpha` gives ()", "shape (B,)"]),
    ],
    ids=["turns", "constant", "negative", "infinite_alpha", "infinite_sigma", "float", "column", "scalar"],
)
def test_interpolant_refuses_bad_scales(alpha, sigma, words):
    with refused(ValueError, words):
        Interpolant(alpha, sigma)


@pytest.mark.parametrize(("low", "high"), [(1, 0), (0, 0), (0, float("inf")), (float("nan"), 1)])
def test_interpolant_refuses_a_bad_range(low, high):
    with pytest.raises(ValueError, match=r"`low` is .*`high`.*low < high"):
        Interpolant(lambda t: 1 - t, lambda t: t, low=low, high=high)


def test_interpolant_refuses_what_is_no_function():
    with pytest.raises(TypeError, match="must be callables"):
        Interpolant(torch.ones(3), torch.ones(3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Discrete(None),
        lambda: Discrete("abc"),
        lambda: Discrete(torch.rand(3, dtype=torch.complex64)),
        lambda: Discrete(torch.empty(3, device="meta")),
        lambda: EDM(sigma_max="80"),
        lambda: EDM(p_std=None),
        lambda: Interpolant(lambda t: 1 - t, lambda t: t, low="0"),
    ],
)
def test_what_is_no_number_is_a_type_error_of_ours(make):
    with pytest.raises(TypeError, match=r"^`\w+` (is|has)"):
        make()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: Interpolant(lambda t: 1 - t, lambda t: -t),
            "`sigma` is negative at t = 0.001, so the signal-to-noise ratio alpha²/sigma² is not monotone. Give scales of "
            "at least 0; the sign of a prediction belongs to `prediction=`.",
        ),
        (
            lambda: Interpolant(lambda t: -t, lambda t: t),
            "`alpha` is negative at t = 0.001, so the signal-to-noise ratio alpha²/sigma² is not monotone. Give scales of "
            "at least 0; the sign of a prediction belongs to `prediction=`.",
        ),
        (
            lambda: Discrete(torch.empty(3, device="meta")),
            "`alpha_bar` has dtype torch.float32 on meta, expected real values.",
        ),
        (
            lambda: Interpolant(torch.ones_like, torch.ones_like),
            "the signal-to-noise ratio alpha²/sigma² neither falls nor rises all along t. Give scales whose ratio is monotone.",
        ),
        (
            lambda: Interpolant(3, lambda t: t),
            "`alpha` and `sigma` must be callables of times of shape (B,), such as `lambda t: 1 - t` and `lambda t: t`.",
        ),
        (
            lambda: Discrete(torch.tensor([1.2, 0.5])),
            "`alpha_bar` leaves [0, 1] or holds NaN, expected ᾱ_t, the cumulative product of 1 − beta. Pass "
            "`scheduler.alphas_cumprod`.",
        ),
        (
            lambda: Discrete("x"),
            "`alpha_bar` is a str, expected a tensor of shape (T,), one value per timestep.",
        ),
        (
            lambda: Discrete.from_betas("x"),
            "`betas` is a str, expected a tensor of shape (T,), one value per timestep.",
        ),
        (
            lambda: TABLE.derivative(torch.tensor([1])),
            "a discrete schedule has no time derivative, so no 'flow_prediction'. Use 'v_prediction', or a continuous "
            "schedule such as schedules.Linear().",
        ),
        (
            lambda: Discrete.linear(steps=1).zero_terminal_snr(),
            "a schedule of one timestep has no terminal SNR to rescale.",
        ),
        (
            lambda: EDM().level(torch.ones(1)),
            "the time of an EDM schedule is sigma, which has no level between 0 (clean) and 1 (noise).",
        ),
        (
            lambda: EDM().check("t", torch.zeros(1)),
            "`t` holds 0, expected times from 1e-06 to 1e+06. The time of an EDM schedule is sigma itself, not "
            "ln(sigma) / 4 and not an index.",
        ),
        (
            lambda: Linear().check("t", torch.zeros(2, 1)),
            "`t` has shape (2, 1), expected (B,), one time per sample. Pass `t.expand(B)` of one number.",
        ),
        (
            lambda: Linear().check("t", torch.zeros(2, 1), 2),
            "`t` has shape (2, 1), expected (2,), one time per sample. Pass `t.flatten()`.",
        ),
        (
            lambda: Linear().ranks(0.5, 2),
            "`low` is 0.5 and `high` 2, expected 0 <= low <= high <= 1 on Linear(shift=1, scale=1).",
        ),
        (lambda: EDM(p_mean=True), "`p_mean` is True, expected a number."),
        (lambda: EDM(sigma_min="0.1"), "`sigma_min` is '0.1', expected a number."),
        (lambda: Interpolant(math.cos, math.sin, high="1"), "`high` is '1', expected a number."),
        (
            lambda: TABLE.check("t", torch.tensor([3, 1000])),
            "`t` holds 1000, expected times from 0 to 999. The unit of time of Discrete(1000 steps) runs from 0 to 999.",
        ),
        (
            lambda: Linear().check("t", torch.zeros(2).to_sparse()),
            "`t` is sparse, expected one number per sample. Pass `t.to_dense()`.",
        ),
        (
            lambda: Linear().check("t", torch.zeros(2, device="meta"), 2, torch.device("cpu")),
            "`t` is on meta, expected cpu, the device of the sample. Pass `t.to('cpu')`.",
        ),
    ],
)
def test_a_refusal_says_what_is_wrong_and_what_to_do(make, sentence):
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (TABLE, "Discrete(1000 steps)"),
        (SCHEDULES["zero_terminal_snr"], "Discrete(1000 steps, zero terminal SNR)"),
        (Linear(), "Linear(shift=1, scale=1)"),
        (Linear(3, scale=1000, reverse=True), "Linear(shift=3, scale=1000, reverse=True)"),
        (Cosine(), "Cosine()"),
        (EDM(), "EDM(sigma_min=0.002, sigma_max=80, p_mean=-1.2, p_std=1.2)"),
        (SCHEDULES["sit"], "Interpolant(low=0, high=1)"),
    ],
)
def test_a_schedule_is_named_by_its_numbers(schedule, text):
    assert repr(schedule) == text


def test_derivatives_are_right_under_inference_mode():
    path = Interpolant(lambda t: 1 - t**2, lambda t: t**2)
    with torch.inference_mode():
        alpha, sigma = path.derivative(torch.tensor([0.5]))
    assert alpha.tolist() == [-1.0]
    assert sigma.tolist() == [1.0]


def test_the_ranks_of_edm_are_those_of_its_distribution_and_whole_at_its_ends():
    schedule = EDM(p_std=0.8)
    low, high = (float(schedule.rank(torch.tensor([sigma], dtype=torch.float64))) for sigma in (0.1, 1.0))
    assert 0 < low < high < 1
    assert schedule.ranks(0.1, 1.0) == (low, high)
    assert schedule.ranks(low=0.1) == (low, 1.0)
    assert schedule.ranks(high=1.0) == (0.0, high)
    assert schedule.ranks() == schedule.ranks(0.002, 80.0) == (0.0, 1.0)


def test_a_table_is_kept_in_float64_whatever_it_is_given_in():
    bar = torch.linspace(0.999, 0.001, 50, dtype=torch.float64)
    for table in (bar.float(), bar.float().numpy(), bar.float().tolist()):
        schedule = Discrete(table)
        assert schedule.alpha_bar.dtype == torch.float64
        assert torch.equal(schedule.alpha_bar, bar.float().double())


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_scales_are_float32_on_a_device_without_float64(schedule, monkeypatch):
    monkeypatch.setattr(schedules, "NO_FLOAT64", ("cpu",))
    if isinstance(schedule, Discrete):
        schedule = Discrete(schedule.alpha_bar)  # one that remembers no table
    t = schedule.at(torch.tensor([0.3, 0.7]))
    assert [scale.dtype for scale in schedule(t)] == [torch.float32] * 2
    assert schedule.rank(t).dtype == torch.float32
