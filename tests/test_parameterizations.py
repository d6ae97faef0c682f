"""Parameterizations: recover, convert, the rows of every prediction, and the pairs that are singular."""

import copy
import itertools
import math
import pickle
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from perceptual_diffusion import parameterizations
from perceptual_diffusion.parameterizations import (
    EPSILON,
    FLOW_PREDICTION,
    SAMPLE,
    SCORE,
    V_PREDICTION,
    Prediction,
    System,
    check_regular,
    convert,
    edm,
    get,
    mix,
    recover,
)
from perceptual_diffusion.schedules import EDM, Cosine, Discrete, Interpolant, Linear

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Error allowed relative to the largest element, by the dtype of the sample, away from the singular ends."""

SCHEDULES = {
    "table": Discrete.scaled_linear(),
    "zero_terminal_snr": Discrete.linear().zero_terminal_snr(),
    "flow": Linear(),
    "flow_shift_3_scale_1000": Linear(3.0, scale=1000),
    "cosine": Cosine(),
    "edm": EDM(),
    "interpolant": Interpolant(lambda t: (1 - t) ** 2, lambda t: 2 * t),
    "sit": Interpolant(lambda t: t, lambda t: 1 - t),
}
PLAIN = [EPSILON, SAMPLE, V_PREDICTION, FLOW_PREDICTION, SCORE, edm(0.5)]
PREDICTIONS = {p.name: p for p in [*PLAIN, *(-p for p in PLAIN)]}
PAIRS = [
    (schedule, prediction)
    for schedule in SCHEDULES
    for prediction in PREDICTIONS
    if not (SCHEDULES[schedule].discrete and "flow" in prediction)
]

pairs = pytest.mark.parametrize(("schedule", "prediction"), PAIRS)
shapes = st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple)


@contextmanager
def refused(error, words):
    """The block raises `error`, and its message holds every one of the words."""
    with pytest.raises(error) as caught:
        yield
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def batch(schedule, shape, seed=0, dtype=torch.float64):
    """A clean sample, noise and times away from the ends; every sample has its own time."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for _ in range(2))
    rank = 0.1 + 0.8 * torch.rand(shape[0], dtype=torch.float64, generator=generator)
    return clean, noise, schedule.at(rank)


def near(actual, expected, tolerance):
    assert actual.shape == expected.shape
    if expected.numel():
        assert float((actual.double() - expected.double()).abs().max()) <= tolerance * float(expected.abs().max())


# Recover


@pairs
@given(shape=shapes, seed=st.integers(0, 99))
@example(shape=(3,), seed=0)
@example(shape=(3, 3, 3, 3), seed=0)
@example(shape=(2, 2), seed=0)
@example(shape=(1, 1, 1), seed=0)
@example(shape=(0, 4, 2), seed=0)
@example(shape=(2, 0, 3), seed=0)
def test_recover_inverts_the_training_target(schedule, prediction, shape, seed):
    schedule, prediction = SCHEDULES[schedule], PREDICTIONS[prediction]
    clean, noise, t = batch(schedule, shape, seed)
    target = mix(clean, noise, *prediction.row(schedule, t))
    clean_hat, noise_hat = recover(mix(clean, noise, *schedule(t)), target, System.of(schedule, prediction, t))
    near(clean_hat, clean, TOLERANCE[torch.float64])
    near(noise_hat, noise, TOLERANCE[torch.float64])


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_recover_inverts_the_training_target_in_every_dtype(prediction, dtype):
    schedule, prediction = Linear(), PREDICTIONS[prediction]
    clean, noise, t = batch(schedule, (4, 3, 4, 4), dtype=dtype)
    x_t, target = mix(clean, noise, *schedule(t)), mix(clean, noise, *prediction.row(schedule, t))
    assert x_t.dtype == target.dtype == dtype
    for hat, true in zip(recover(x_t, target, System.of(schedule, prediction, t)), (clean, noise), strict=True):
        assert hat.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        near(hat, true, TOLERANCE[dtype])


@pairs
def test_each_sample_has_its_own_time(schedule, prediction):
    """In a square batch, B = C = H = W, a scale laid along the wrong dimension would raise no error."""
    schedule, prediction = SCHEDULES[schedule], PREDICTIONS[prediction]
    clean, noise, t = batch(schedule, (3, 3, 3, 3))
    scales = [*schedule(t), *prediction.row(schedule, t)]
    x_t, target = mix(clean, noise, *scales[:2]), mix(clean, noise, *scales[2:])
    for i in range(3):
        alpha, sigma, a, b = (float(scale[i]) for scale in scales)
        near(x_t[i], alpha * clean[i] + sigma * noise[i], 1e-12)
        near(target[i], a * clean[i] + b * noise[i], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mix_is_rounded_once(dtype):
    """To half a unit in the last place: the scales are not rounded to the dtype of the sample before they multiply."""
    clean, noise, t = batch(SCHEDULES["table"], (64, 50), dtype=dtype)
    scales = SCHEDULES["table"](t)
    mixed = mix(clean, noise, *scales)
    exact = mix(clean.double(), noise.double(), *scales)
    assert mixed.dtype == dtype
    half_step = torch.finfo(dtype).eps / 2
    assert ((mixed.double() - exact).abs() <= 1.001 * half_step * exact.abs() + 1e-6).all()


def test_mix_has_the_wider_dtype_of_the_two():
    one = torch.ones(2)
    for clean, noise, expected in [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float16, torch.bfloat16, torch.float32),
    ]:
        assert mix(torch.ones(2, 3, dtype=clean), torch.ones(2, 3, dtype=noise), one, one).dtype == expected


# Convert


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shape", [(3, 3, 3, 3), (2, 5), (4,), (0, 3), (1, 1)])
def test_convert_is_a_groupoid(name, shape):
    """There and back is nothing, and by way of a third is straight: for all pairs and triples of predictions."""
    schedule = SCHEDULES[name]
    clean, noise, t = batch(schedule, shape)
    x_t = mix(clean, noise, *schedule(t))
    kinds = [kind for kind in PLAIN if (name, kind.name) in PAIRS]
    output = torch.randn_like(clean)  # any output, not only the perfect one

    def to(value, a, b):
        return convert(value, x_t, t, schedule=schedule, source=a, to=b)

    for a, b in itertools.product(kinds, kinds):
        at_b = to(output, a, b)
        near(to(at_b, b, a), output, 1e-8)
        for c in kinds:
            near(to(at_b, b, c), to(output, a, c), 1e-8)


@pairs
def test_convert_turns_targets_into_targets(schedule, prediction):
    schedule = SCHEDULES[schedule]
    clean, noise, t = batch(schedule, (4, 3, 2))
    source = mix(clean, noise, *PREDICTIONS[prediction].row(schedule, t))
    for name, to in PREDICTIONS.items():
        if schedule.discrete and "flow" in name:
            continue
        converted = convert(
            source, mix(clean, noise, *schedule(t)), t, schedule=schedule, source=PREDICTIONS[prediction], to=to
        )
        near(converted, mix(clean, noise, *to.row(schedule, t)), TOLERANCE[torch.float64])


def test_convert_takes_names():
    schedule = SCHEDULES["table"]
    clean, noise, t = batch(schedule, (4, 3))
    x_t = mix(clean, noise, *schedule(t))
    near(convert(noise, x_t, t, schedule=schedule, source="epsilon", to="sample"), clean, 1e-9)
    near(convert(clean, x_t, t, schedule=schedule, source="sample", to="epsilon"), noise, 1e-9)


@pytest.mark.parametrize(
    ("schedule", "source", "to", "t", "words"),
    [
        (SCHEDULES["zero_terminal_snr"], EPSILON, SAMPLE, 999, ["'epsilon'", "t = 999", "zero terminal SNR"]),
        (Linear(), EPSILON, FLOW_PREDICTION, 1.0, ["'epsilon'", "t = 1", "alpha is 0"]),
        (Linear(), SAMPLE, FLOW_PREDICTION, 0.0, ["'sample'", "t = 0", "sigma is 0"]),
        (Linear(), SCORE, V_PREDICTION, 1.0, ["'score'", "t = 1", "alpha is 0"]),
        (Linear(), SCORE, V_PREDICTION, 0.0, ["'score'", "t = 0", "sigma is 0"]),
        (Linear(), edm(), V_PREDICTION, 0.0, ["'edm'", "t = 0", "sigma is 0"]),
        (Linear(), V_PREDICTION, SCORE, 0.0, ["'score'", "infinite"]),
        (Linear(), V_PREDICTION, edm(), 0.0, ["'edm'", "infinite"]),
    ],
)
def test_convert_refuses_a_singular_time(schedule, source, to, t, words):
    """Also where only one sample of the batch has it."""
    inside = float(schedule.at(torch.tensor(0.5)))
    t = torch.tensor([inside, t])
    x_t = torch.ones(2, 3)
    with refused(ValueError, words):
        convert(x_t, x_t, t, schedule=schedule, source=source, to=to)


@pytest.mark.parametrize(
    ("x_t", "t", "match"),
    [
        (torch.ones(2, 3), torch.tensor([1, 2]), r"`model_output` has shape \(2, 4\), expected \(2, 3\)"),
        (torch.ones(2, 4), torch.tensor([1]), r"`t` has shape \(1,\), expected \(2,\)"),
        (torch.ones(2, 4), torch.tensor([1, 1000]), r"`t` holds 1000"),
        (torch.ones(2, 4), torch.tensor([1, 2], device="meta"), r"`t` is on meta, expected cpu"),
    ],
)
def test_convert_refuses_what_does_not_fit(x_t, t, match):
    with pytest.raises(ValueError, match=match):
        convert(torch.ones(2, 4), x_t, t, schedule=SCHEDULES["table"], source="epsilon", to="sample")


@pytest.mark.parametrize("narrow", ["clean", "noise"])
def test_mix_computes_in_the_wider_dtype_whichever_has_it(narrow):
    pair = {
        name: torch.randn(2, 3, dtype=torch.float32 if name == narrow else torch.float64) for name in ("clean", "noise")
    }
    mixed = mix(**pair, clean_scale=torch.tensor([1 / 3, 1.0]), noise_scale=torch.tensor([2 / 3, 1.0]).double())
    assert mixed.dtype == torch.float64
    expected = torch.stack(
        [
            scale * pair["clean"][row].double() + other * pair["noise"][row].double()
            for row, (scale, other) in enumerate([(float(torch.tensor(1 / 3)), float(torch.tensor(2 / 3))), (1, 1)])
        ]
    )
    torch.testing.assert_close(mixed, expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("wide", ["x_t", "model_output"])
@pytest.mark.parametrize(("narrow", "wider"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_recover_and_convert_compute_in_the_wider_dtype_whichever_has_it(wide, narrow, wider):
    given = {name: torch.randn(2, 3).to(wider if name == wide else narrow) for name in ("x_t", "model_output")}
    both = {name: x.to(wider) for name, x in given.items()}
    schedule, t = SCHEDULES["cosine"], torch.tensor([0.3, 0.8])
    system = System.of(schedule, V_PREDICTION, t)
    for found, expected in zip(recover(**given, system=system), recover(**both, system=system), strict=True):
        assert found.dtype == wider
        assert torch.equal(found, expected)
    kinds = {"t": t, "schedule": schedule, "source": "v_prediction", "to": "epsilon"}
    assert torch.equal(convert(**given, **kinds), convert(**both, **kinds))


@pytest.mark.parametrize("row", [(1e39, 1.0), (1.0, 1e39)])
@pytest.mark.parametrize("wide", ["x_t", "model_output"])
def test_convert_refuses_a_row_that_is_beyond_the_dtype_it_computes_in(row, wide):
    huge = Prediction(
        name="huge", row=lambda schedule, t: tuple(torch.full_like(t, x, dtype=torch.float64) for x in row)
    )
    given = {"x_t": torch.ones(2, 3), "model_output": torch.ones(2, 3)}
    kinds = {"t": torch.tensor([0.3, 0.8]), "schedule": SCHEDULES["cosine"], "source": "v_prediction", "to": huge}
    with pytest.raises(ValueError, match="'huge' is infinite at one of the times"):
        convert(**given, **kinds)
    assert bool(convert(**given | {wide: given[wide].double()}, **kinds).isfinite().all())


# Gradients


@pairs
def test_gradcheck_of_recover(schedule, prediction):
    schedule, prediction = SCHEDULES[schedule], PREDICTIONS[prediction]
    x_t, output, t = batch(schedule, (2, 3))
    system = System.of(schedule, prediction, t)
    assert torch.autograd.gradcheck(lambda x, y: recover(x, y, system), (x_t.requires_grad_(), output.requires_grad_()))


@pairs
def test_gradcheck_of_convert(schedule, prediction):
    schedule, prediction = SCHEDULES[schedule], PREDICTIONS[prediction]
    x_t, output, t = batch(schedule, (2, 3))
    assert torch.autograd.gradcheck(
        lambda y, x: convert(y, x, t, schedule=schedule, source=prediction, to=-V_PREDICTION),
        (output.requires_grad_(), x_t.requires_grad_()),
    )


# The row of each prediction, against the paper that it is of


def test_v_prediction_is_that_of_salimans_and_ho():
    """v = alpha ε − sigma x, x̂ = alpha z − sigma v̂, ε̂ = sigma z + alpha v̂, where alpha² + sigma² = 1."""
    for schedule in (SCHEDULES["table"], SCHEDULES["zero_terminal_snr"], Cosine()):
        x, eps, t = batch(schedule, (4, 3))
        alpha, sigma = (scale[:, None] for scale in schedule(t))
        near(mix(x, eps, *V_PREDICTION.row(schedule, t)), alpha * eps - sigma * x, 1e-12)
        z, v = torch.randn_like(x), torch.randn_like(x)
        x_hat, eps_hat = recover(z, v, System.of(schedule, V_PREDICTION, t))
        near(x_hat, alpha * z - sigma * v, 1e-12)
        near(eps_hat, sigma * z + alpha * v, 1e-12)


def test_epsilon_is_that_of_ho_et_al():
    """x̂_0 = (x_t − √(1 − ᾱ) ε̂) / √ᾱ."""
    schedule = SCHEDULES["table"]
    x_t, eps, t = batch(schedule, (4, 3))
    bar = schedule.alpha_bar[t][:, None]
    clean_hat, noise_hat = recover(x_t, eps, System.of(schedule, EPSILON, t))
    near(clean_hat, (x_t - (1 - bar).sqrt() * eps) / bar.sqrt(), 1e-12)
    near(noise_hat, eps, 1e-12)


def test_flow_prediction_on_the_straight_path_is_noise_minus_clean_whatever_the_shift():
    for schedule in (Linear(), Linear(3.0), Linear(scale=1000), Linear(3.0, scale=1000)):
        clean, noise, t = batch(schedule, (4, 3))
        near(mix(clean, noise, *FLOW_PREDICTION.row(schedule, t)), noise - clean, 1e-12)
        flow = torch.randn_like(clean)
        x_t = mix(clean, noise, *schedule(t))
        sigma = schedule(t)[1][:, None]
        near(recover(x_t, flow, System.of(schedule, FLOW_PREDICTION, t))[0], x_t - sigma * flow, 1e-12)


@pytest.mark.parametrize("name", ["flow", "cosine", "edm", "interpolant", "sit"])
def test_flow_prediction_is_the_velocity_of_x_t(name):
    schedule = SCHEDULES[name]
    clean, noise, t = batch(schedule, (4, 3))
    step = 1e-6 * t
    ahead, behind = (mix(clean, noise, *schedule(t + s)) for s in (step, -step))
    near(mix(clean, noise, *FLOW_PREDICTION.row(schedule, t)), (ahead - behind) / (2 * step[:, None]), 1e-6)


def test_flow_prediction_of_sit_is_clean_minus_noise():
    """SiT has its data at t = 1: the same rule turns the sign, nothing else may."""
    clean, noise, t = batch(SCHEDULES["sit"], (4, 3))
    near(mix(clean, noise, *FLOW_PREDICTION.row(SCHEDULES["sit"], t)), clean - noise, 1e-12)


@pytest.mark.parametrize("name", ["table", "flow", "cosine", "edm"])
def test_score_is_the_gradient_of_the_log_density(name):
    schedule = SCHEDULES[name]
    clean, noise, t = batch(schedule, (4, 3))
    alpha, sigma = (scale[:, None] for scale in schedule(t))
    x_t = mix(clean, noise, *schedule(t)).requires_grad_()
    log_density = torch.distributions.Normal(alpha * clean, sigma).log_prob(x_t).sum()
    (expected,) = torch.autograd.grad(log_density, x_t)
    near(mix(clean, noise, *SCORE.row(schedule, t)), expected, 1e-9)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
def test_edm_is_the_network_inside_the_denoiser(sigma_data):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), Karras et al. 2022, eq. 7 and table 1."""
    schedule = EDM()
    clean, noise, t = batch(schedule, (5, 3))
    sigma = t[:, None]
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma_data**2 + sigma**2).sqrt()
    x = clean + sigma * noise
    target = (clean - c_skip * x) / c_out  # eq. 8
    near(mix(clean, noise, *edm(sigma_data).row(schedule, t)), target, 1e-9)
    output = torch.randn_like(clean)
    denoised = c_skip * x + c_out * output
    clean_hat, noise_hat = recover(x, output, System.of(schedule, edm(sigma_data), t))
    near(clean_hat, denoised, 1e-9)
    near(noise_hat, (x - denoised) / sigma, 1e-9)


def test_edm_has_a_target_of_unit_variance():
    """What c_out is chosen for: with data of std sigma_data, F's target has variance 1 at every sigma."""
    t = EDM().at(torch.linspace(0, 1, 51, dtype=torch.float64))
    a, b = edm(0.7).row(EDM(), t)
    torch.testing.assert_close((0.7 * a) ** 2 + b**2, torch.ones_like(t))


@pairs
def test_a_negated_prediction_has_the_opposite_target(schedule, prediction):
    schedule, prediction = SCHEDULES[schedule], PREDICTIONS[prediction]
    _, _, t = batch(schedule, (4,))
    for negated, plain in zip((-prediction).row(schedule, t), prediction.row(schedule, t), strict=True):
        assert torch.equal(negated, -plain)
    assert (-prediction).name.removeprefix("-") == prediction.name.removeprefix("-")
    assert (-prediction).name.startswith("-") is not prediction.name.startswith("-")
    negative = -prediction
    assert -negative == prediction


@pairs
def test_the_determinant_is_that_of_the_system(schedule, prediction):
    schedule, prediction = SCHEDULES[schedule], PREDICTIONS[prediction]
    _, _, t = batch(schedule, (4,))
    alpha, sigma = schedule(t)
    a, b = prediction.row(schedule, t)
    matrices = torch.stack([torch.stack([alpha, sigma], 1), torch.stack([a, b], 1)], 1)
    torch.testing.assert_close(
        System.of(schedule, prediction, t).determinant, torch.linalg.det(matrices), rtol=1e-9, atol=0
    )


# Singular pairs


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("schedule", "prediction", "time", "cause", "low", "high"),
    [
        (SCHEDULES["zero_terminal_snr"], EPSILON, "999", "alpha is 0 (zero terminal SNR)", 0, 998),
        (SCHEDULES["zero_terminal_snr"], SCORE, "999", "alpha is 0 (zero terminal SNR)", 0, 998),
        (Linear(), EPSILON, "1", "alpha is 0", 0, 0.9),
        (Linear(3.0), EPSILON, "1", "alpha is 0", 0, 0.9999),
        (Linear(scale=1000), EPSILON, "1000", "alpha is 0", 0, 999),
        (Cosine(), EPSILON, "1", "alpha is 0", 0, 0.9),
        (SCHEDULES["sit"], EPSILON, "0", "alpha is 0", 0.1, 1),
        (SCHEDULES["interpolant"], EPSILON, "1", "alpha is 0", 0, 0.9),
        (SCHEDULES["interpolant"], FLOW_PREDICTION, "1", "alpha is 0", 0, 0.9),  # (1 − t)² has slope 0 there
        (Linear(), SAMPLE, "0", "sigma is 0", 0.1, 1),
        (Linear(3.0, scale=1000), SAMPLE, "0", "sigma is 0", 1, 1000),
        (Cosine(), SAMPLE, "0", "sigma is 0", 0.0001, 1),
        (SCHEDULES["sit"], SAMPLE, "1", "sigma is 0", 0, 0.9),
        (Linear(), SCORE, "0", "sigma is 0", 0.1, 0.9),
        (Cosine(), SCORE, "0", "sigma is 0", 0.1, 0.9),
        (Linear(), edm(), "0", "sigma is 0", 0.1, 1),
        (Cosine(), edm(), "0", "sigma is 0", 0.1, 1),
    ],
)
def test_a_singular_pair_is_refused_unless_the_range_leaves_the_time_out(
    schedule, prediction, time, cause, low, high, sign
):
    prediction = prediction if sign > 0 else -prediction
    with refused(
        ValueError, [f"'{prediction.name}'", repr(schedule), f"at t = {time} of", cause, "t_range=(low, high)"]
    ):
        check_regular(schedule, prediction, schedule.low, schedule.high)
    check_regular(schedule, prediction, low, high)


@pytest.mark.parametrize(
    ("schedule", "prediction", "start"),
    [
        (
            SCHEDULES["zero_terminal_snr"],
            EPSILON,
            "at t = 999 of Discrete(1000 steps, zero terminal SNR) alpha is 0 (zero terminal SNR): 'epsilon' ",
        ),
        (Linear(), SAMPLE, "at t = 0 of Linear(shift=1, scale=1) sigma is 0: 'sample' "),
        (
            Linear(),
            Prediction(name="both", row=lambda schedule, t: (torch.ones_like(t), torch.ones_like(t))),
            "at t = 0.5 of Linear(shift=1, scale=1) the determinant is 0: 'both' ",
        ),
    ],
    ids=["alpha", "sigma", "determinant"],
)
def test_the_refusal_of_a_singular_pair_says_why_and_what_to_do(schedule, prediction, start):
    with pytest.raises(ValueError, match="at t = ") as caught:
        check_regular(schedule, prediction, schedule.low, schedule.high)
    assert str(caught.value) == (
        f"{start}cannot give back the clean sample and the noise there. Use 'v_prediction', or leave that time out with "
        "`t_range=(low, high)`."
    )


def test_a_range_that_still_holds_the_singular_time_is_refused():
    for low, high in ((0.5, 1), (0.99999, 1)):
        with pytest.raises(ValueError, match=r"at t = 1 .*'epsilon'"):
            check_regular(Linear(), EPSILON, low, high)


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        *((name, V_PREDICTION) for name in SCHEDULES),
        *((name, FLOW_PREDICTION) for name in ("flow", "flow_shift_3_scale_1000", "cosine", "edm", "sit")),
        *(("table", kind) for kind in (EPSILON, SAMPLE, SCORE, edm())),
        *(("edm", kind) for kind in (EPSILON, SAMPLE, SCORE, edm())),
        ("zero_terminal_snr", SAMPLE),
    ],
)
def test_a_regular_pair_is_accepted_on_the_whole_schedule(name, prediction):
    schedule = SCHEDULES[name]
    check_regular(schedule, prediction, schedule.low, schedule.high)
    check_regular(schedule, -prediction, schedule.low, schedule.high)


@pytest.mark.parametrize("name", ["table", "zero_terminal_snr"])
def test_flow_prediction_on_a_table_is_refused_for_want_of_a_derivative(name):
    schedule = SCHEDULES[name]
    with pytest.raises(ValueError, match=r"no time derivative.*'flow_prediction'.*'v_prediction'"):
        check_regular(schedule, FLOW_PREDICTION, schedule.low, schedule.high)


def test_a_prediction_of_x_t_itself_is_singular_everywhere():
    useless = Prediction(name="identity", row=lambda schedule, t: schedule(t))
    with pytest.raises(ValueError, match="the determinant is 0: 'identity'"):
        check_regular(SCHEDULES["table"], useless, 10, 20)


def test_a_prediction_that_is_singular_inside_the_schedule_is_found():
    """y = x_0 + ε is parallel to x_t where alpha = sigma: at the middle of the straight path, and nowhere else."""
    both = Prediction(name="both", row=lambda schedule, t: (torch.ones_like(t), torch.ones_like(t)))
    with pytest.raises(ValueError, match=r"at t = 0\.5 .*the determinant is 0: 'both'"):
        check_regular(Linear(), both, 0, 1)
    check_regular(Linear(), both, 0.6, 1)


@pytest.mark.parametrize("place", [1 / 3, 0.0005, 0.9995])
def test_the_ends_of_the_range_are_checked_wherever_they_lie(place):
    """y = (1/t - 1) x_0 + ε is parallel to x_t at that t, which is no point of the schedule's grid."""
    part = 1 / place - 1
    there = Prediction(name="there", row=lambda schedule, t: (part * torch.ones_like(t), torch.ones_like(t)))
    for low, high in ((place, 0.99999), (0.00001, place)):
        with pytest.raises(ValueError, match=rf"at t = {place:g} .*'there'"):
            check_regular(Linear(), there, low, high)


def test_a_row_that_is_not_finite_is_singular():
    broken = Prediction(name="broken", row=lambda schedule, t: (t * math.nan, torch.ones_like(t)))
    with pytest.raises(ValueError, match="'broken'"):
        check_regular(Linear(), broken, 0.1, 0.9)


# Names


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown prediction") as error:
        get("velocity")
    assert str(error.value) == (
        "unknown prediction 'velocity', expected one of 'epsilon', 'sample', 'v_prediction', 'flow_prediction', with a leading "
        "'-' where the model predicts the negative, or a parameterizations.Prediction."
    )
    for name in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        assert get(name).name == name


@pytest.mark.parametrize("name", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_a_leading_minus_names_the_negative(name):
    assert get(f"-{name}") == -get(name)
    assert get(f"-{name}").name == f"-{name}"


@pytest.mark.parametrize("name", ["--epsilon", "-", "-velocity", "- epsilon", "epsilon-"])
def test_a_minus_makes_no_name_of_what_is_none(name):
    with pytest.raises(ValueError, match=rf"unknown prediction '{name}', expected .*leading '-'"):
        get(name)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_reversed_path_predicts_noise_minus_clean_and_sit_its_negative(shift):
    """The direction of time turns no sign: SiT's data − noise is '-flow_prediction' on Linear(reverse=True)."""
    schedule = Linear(shift, scale=1000, reverse=True)
    t = torch.tensor([0.0, 300.0, 1000.0], dtype=torch.float64)
    clean, noise = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    for name, y in (("flow_prediction", noise - clean), ("-flow_prediction", clean - noise)):
        system = System.of(schedule, get(name), t)
        assert torch.equal(mix(clean, noise, system.a, system.b), y)
        clean_hat, noise_hat = recover(mix(clean, noise, system.alpha, system.sigma), y, system)
        torch.testing.assert_close(clean_hat, clean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(noise_hat, noise, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", [-get("flow_prediction"), edm(0.7), -edm(0.7), SCORE])
def test_a_prediction_can_be_pickled_and_is_equal_to_its_twin(prediction):
    assert pickle.loads(pickle.dumps(prediction)) == copy.deepcopy(prediction) == prediction
    assert edm(0.7) != edm(0.5)


def test_get_passes_a_prediction_through_and_refuses_anything_else():
    assert get(SCORE) is SCORE
    for value in (None, 3, lambda schedule, t: schedule(t)):
        with pytest.raises(TypeError, match=f"`prediction` is a {type(value).__name__}, expected a name"):
            get(value)


def test_every_name_is_of_a_prediction_of_that_name():
    assert set(parameterizations.NAMED) == {"epsilon", "sample", "v_prediction", "flow_prediction"}
    assert (edm().name, (-edm()).name, SCORE.name) == ("edm", "-edm", "score")
    assert edm() == edm(0.5)  # of EDM's data
    assert all(prediction.name == name for name, prediction in parameterizations.NAMED.items())


@pytest.mark.parametrize("sigma_data", [0, -0.5, math.nan, math.inf])
def test_edm_refuses_a_sigma_data_that_is_not_a_positive_number(sigma_data):
    with pytest.raises(ValueError, match=r"`sigma_data` is .*expected a positive number"):
        edm(sigma_data)
