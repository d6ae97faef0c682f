"""Numbers at every time: conversions, weights, loss and gradient against float64, in every dtype, on every schedule.

The bounds are those of rounding. u is half a unit in the last place of the dtype; a value that is computed as a sum of terms
and rounded a few times is off by at most a few u times the sum of the terms' sizes. Where a number is too large for its dtype,
the sample is infinite, and `nonfinite="raise"` says so; nothing else is.
"""

import itertools

import pytest
import torch
from models import distance
from paper import PaperObjective

from perceptual_diffusion import distances, timesteps
from perceptual_diffusion.nonfinite import NonFiniteError
from perceptual_diffusion.parameterizations import (
    EPSILON,
    FLOW_PREDICTION,
    SAMPLE,
    SCORE,
    V_PREDICTION,
    System,
    convert,
    edm,
)
from perceptual_diffusion.schedules import EDM, Cosine, Discrete, Interpolant, Linear
from perceptual_diffusion.weights import MinSNR

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
N = 6
"""Numbers in a sample."""
PART = 64
"""Samples that go through the teacher at a time."""
SCHEDULES = {
    "scaled_linear": Discrete.scaled_linear(),
    "linear": Discrete.linear(),
    "cosine": Discrete.cosine(),
    "zero_terminal_snr": Discrete.scaled_linear().zero_terminal_snr(),
    "flow": Linear(),
    "flow_shift_3": Linear(3.0, scale=1000),
    "flow_reversed": Linear(0.3, reverse=True),
    "circle": Cosine(),
    "edm": EDM(),
    "sit": Interpolant(lambda t: t, lambda t: 1 - t),
}
PREDICTIONS = {p.name: p for p in (EPSILON, SAMPLE, V_PREDICTION, FLOW_PREDICTION, SCORE, edm(), -edm(), -V_PREDICTION)}
PAIRS = [(s, p) for s, p in itertools.product(SCHEDULES, PREDICTIONS) if not (SCHEDULES[s].discrete and "flow" in p)]

FEW = {
    ("scaled_linear", "epsilon"), ("cosine", "epsilon"), ("zero_terminal_snr", "v_prediction"), ("edm", "edm"),
    ("flow_shift_3", "flow_prediction"), ("circle", "-v_prediction"),
}  # fmt: skip
"""The pairs in use; the others are slow, being many."""

pairs = pytest.mark.parametrize(("name", "kind"), PAIRS)
few_pairs = pytest.mark.parametrize(
    ("name", "kind"), [pair if pair in FEW else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS]
)


def every_time(name):
    """All thousand of a table, else a dense grid with both ends; of EDM also sigmas that are never drawn."""
    schedule = SCHEDULES[name]
    if schedule.discrete:
        return schedule.grid()
    more = [1e-6, 0.002, 80.0, 1e4, 1e6] if name == "edm" else [schedule.low, schedule.high]
    near = [] if name == "edm" else [schedule.high * x for x in (1e-6, 1e-4, 0.9999, 1 - 2**-24)]
    return torch.cat([schedule.grid(), torch.tensor(more + near, dtype=torch.float64)]).float()


def regular(name, kind, t):
    determinant = System.of(SCHEDULES[name], PREDICTIONS[kind], t).determinant
    return (determinant.abs() > 1e-12) & determinant.isfinite()


def rms(x):
    return x.double().square().mean(1).sqrt()


# --- schedules, conversions, weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_scales_are_finite_and_not_both_0_at_every_time(name):
    t = every_time(name)
    alpha, sigma = SCHEDULES[name](t)
    assert alpha.isfinite().all()
    assert sigma.isfinite().all()
    assert (alpha + sigma > 0.9).all()


@few_pairs
def test_every_conversion_is_finite_and_right_at_every_time_or_refused(name, kind):
    """Against the same formulas in float64, on the same rounded numbers."""
    schedule, source, t = SCHEDULES[name], PREDICTIONS[kind], every_time(name)
    x_t, output = torch.randn(2, len(t), N, dtype=torch.float64)
    good = regular(name, kind, t)
    for moment in t[~good][:3]:
        with pytest.raises(ValueError, match=f"'{kind}' cannot give back the clean sample"):
            convert(output[:1], x_t[:1], moment[None], schedule=schedule, source=source, to=V_PREDICTION)
    t, x_t, output = t[good], x_t[good], output[good]
    for to in PREDICTIONS.values():
        if schedule.discrete and "flow" in to.name:
            continue
        a, b = (scale.abs()[:, None] for scale in to.row(schedule, t))
        inside = (a.isfinite() & b.isfinite()).squeeze(1)
        if not inside.all():
            with pytest.raises(ValueError, match=f"'{to.name}' is infinite at one of the times"):
                convert(output, x_t, t, schedule=schedule, source=source, to=to)
        a, b, at = a[inside], b[inside], t[inside]
        system = System.of(schedule, source, at)
        delta = system.determinant
        for dtype in DTYPES:
            seen, given = x_t[inside].to(dtype), output[inside].to(dtype)
            found = convert(given, seen, at, schedule=schedule, source=source, to=to)
            truth = convert(given.double(), seen.double(), at, schedule=schedule, source=source, to=to)
            x, y = seen.double().abs(), given.double().abs()
            clean = (system.b / delta).abs()[:, None] * x + (system.sigma / delta).abs()[:, None] * y
            noise = (system.alpha / delta).abs()[:, None] * y + (system.a / delta).abs()[:, None] * x
            assert found.isfinite().all()
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert ((found - truth).abs() <= 4 * torch.finfo(torch.float32).eps * (a * clean + b * noise)).all()


def test_a_row_too_large_for_the_dtype_is_refused():
    t, x = torch.tensor([1e-40]), torch.ones(1, 2)
    with pytest.raises(ValueError, match="'score' is infinite at one of the times"):
        convert(x, x, t, schedule=Linear(), source=V_PREDICTION, to=SCORE)


@pairs
def test_min_snr_is_finite_at_every_time(name, kind):
    """Also where the pair is singular, unless the target itself is infinite; elsewhere it is what its paper says."""
    schedule, prediction, t = SCHEDULES[name], PREDICTIONS[kind], every_time(name)
    weight = MinSNR(schedule=schedule, prediction=prediction)(t)
    a, b = prediction.row(schedule, t)
    target = a.isfinite() & b.isfinite()
    assert weight[target].isfinite().all()
    assert (weight[target] >= 0).all()
    assert not (regular(name, kind, t) & ~target).any()
    good = regular(name, kind, t) & (schedule(t)[1] > 0)
    system = System.of(schedule, prediction, t[good])
    snr = (system.alpha / system.sigma) ** 2
    expected = snr.clamp(max=5) * (system.sigma / system.determinant) ** 2
    torch.testing.assert_close(weight[good], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_the_drawing_of_t_prime_weighs_by_is_finite_at_every_pair_of_times(name):
    schedule, sampler = SCHEDULES[name], timesteps.Contributing()
    t = every_time(name)
    t = t[(t >= schedule.drawn[0]) & (t <= schedule.drawn[1])]
    for t_prime in (t.flip(0), t[:1].expand(len(t)), t[-1:].expand(len(t))):
        weight = sampler.weight(schedule, t, t_prime)
        assert ((weight > 0) & (weight <= 10 + 1e-9)).all()


# --- the loss and its gradient ----------------------------------------------------------------------------------------


def objective_of(name, kind, **options):
    """One whose teacher is the identity; where the pair is singular somewhere, on the rest of the schedule."""
    schedule, prediction = SCHEDULES[name], PREDICTIONS[kind]
    options = {"schedule": schedule, "prediction": prediction, "teacher": lambda x, t, cond: [x]} | options
    good = regular(name, kind, schedule.grid())
    if good.all():
        return PaperObjective(**options)
    with pytest.raises(ValueError, match=rf"'{kind}' cannot give back .*`t_range=\(low, high\)`"):
        PaperObjective(**options)
    inside = schedule.grid()[good]
    return PaperObjective(**options, t_range=(float(inside[0]), float(inside[-1])))


def step(objective, tensors, t, t_prime, dtype):
    prediction, clean, noise = (x.detach().to(dtype) for x in tensors)
    prediction = prediction.clone().requires_grad_()
    losses = objective.loss(prediction, clean=clean, noise=noise, t=t, t_prime=t_prime, reduction="none")
    losses.sum().backward()
    return losses.detach().double(), prediction.grad.double(), objective.terms


def sizes(objective, tensors, t, t_prime):
    """κ, and the sizes of what the two inputs of the teacher are sums of, in float64; and the largest number of all."""
    prediction, clean, noise = (x.double() for x in tensors)
    system, (alpha, sigma) = System.of(objective.schedule, objective.prediction, t), objective.schedule(t_prime)
    kappa = (sigma * system.alpha - alpha * system.sigma) / system.determinant
    target = system.a[:, None] * clean + system.b[:, None] * noise
    x_tt = alpha[:, None] * clean + sigma[:, None] * noise
    shifted = x_tt + kappa[:, None] * (prediction - target)
    of_target = rms(system.a[:, None] * clean) + rms(system.b[:, None] * noise)
    terms = rms(alpha[:, None] * clean) + rms(sigma[:, None] * noise) + rms(shifted)
    largest = torch.cat([shifted.abs(), x_tt.abs(), target.abs()], 1).amax(1)
    return kappa.abs(), terms + kappa.abs() * (of_target + rms(prediction)), of_target + rms(prediction), largest


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["float32", "bfloat16", "float16"])
@few_pairs
def test_loss_and_gradient_are_right_at_every_time_or_the_sample_is_named(name, kind, dtype):
    """√L is a distance: it is off by at most what its two ends are. And so is its gradient, 2 κ (x̂_t' − x_t') / N."""
    objective = objective_of(name, kind, nonfinite="raise", micro_batch=PART)
    plain = objective_of(name, kind)
    low, high = objective.t_range if name != "edm" else (0, 1e6)
    whole = every_time(name)
    t = whole[(whole >= low) & (whole <= high) & regular(name, kind, whole)]
    shuffled = t[torch.randperm(len(t), generator=torch.Generator().manual_seed(0))]
    u = torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps
    clean, noise = torch.randn(2, len(t), N).to(dtype).double()
    prediction = objective.target(clean, noise, t) * 1.2 + 0.3 * torch.randn(len(t), N, dtype=torch.float64)
    tensors = prediction.to(dtype), clean, noise
    for t_prime in (shuffled, whole[:1].expand(len(t)), whole[-1:].expand(len(t)), t):
        kappa, terms, of_error, largest = sizes(objective, tensors, t, t_prime)
        truth, expected, _ = step(plain, tensors, t, t_prime, torch.float64)
        largest = torch.stack([largest, tensors[0].abs().amax(1), expected.abs().amax(1)]).nan_to_num(torch.inf).amax(0)
        limit = torch.finfo(dtype).max
        refused = set((largest > 1.001 * limit).nonzero().flatten().tolist())  # in float16 alone
        if refused:
            with pytest.raises(NonFiniteError) as caught:
                step(objective, tensors, t, t_prime, dtype)
            assert refused <= set(caught.value.samples)
        holds = largest < 0.999 * limit
        if not holds.any():  # at t' = 1e6
            continue
        order = truth[
            holds
        ].argsort()  # a part has one scale in float16, under which what is 2^-24 of its largest is lost
        some = [x[holds][order] for x in (*tensors, t, t_prime)]
        kappa, terms, of_error = (x[holds][order] for x in (kappa, terms, of_error))
        losses, gradient, found = step(objective, some[:3], *some[3:], dtype)
        truth, expected, exact = step(plain, some[:3], *some[3:], torch.float64)
        assert losses.isfinite().all()
        assert gradient.isfinite().all()
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * N  # numbers below are rounded to multiples
        off = 4 * u * terms + tiny
        assert ((losses.sqrt() - truth.sqrt()).abs() <= off).all()
        largest = torch.cat([part.amax().expand(len(part)) for part in truth.sqrt().split(PART)])
        lost = kappa * tiny * (largest + 1) + torch.finfo(torch.float32).tiny
        assert (
            (gradient - expected).norm(dim=1) <= 2 * kappa / N**0.5 * off + 4 * u * expected.norm(dim=1) + lost
        ).all()
        assert ((found["mse"].double().sqrt() - exact["mse"].sqrt()).abs() <= 4 * u * of_error).all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("formulation", ["joint", "split"])
@pytest.mark.parametrize("name", ["scaled_linear", "zero_terminal_snr", "flow_shift_3", "edm"])
def test_the_weighted_loss_is_finite_and_close_at_every_time(name, formulation, dtype):
    options = {"weight": "min_snr", "mse_weight": 1.0, "formulation": formulation, "nonfinite": "raise"}
    objective, t = objective_of(name, "v_prediction", **options), SCHEDULES[name].grid()
    t = t if SCHEDULES[name].discrete else t.float()
    clean, noise, error = torch.randn(3, len(t), N).to(dtype).double()
    tensors = (objective.target(clean, noise, t) + error).to(dtype), clean, noise
    for t_prime in (t.flip(0), t[:1].expand(len(t)), t[-1:].expand(len(t))):
        low, high = (step(objective, tensors, t, t_prime, d)[:2] for d in (dtype, torch.float64))
        for found, expected in zip(low, high, strict=True):
            assert distance(found, expected) < 8 * torch.finfo(dtype).eps
            assert found.isfinite().all()


def test_times_that_no_schedule_has_are_refused():
    for name, t in (("edm", 0.0), ("edm", 1e7), ("flow", -1e-3), ("flow_shift_3", 1001.0), ("scaled_linear", 1000)):
        objective = objective_of(name, "v_prediction")
        with pytest.raises(ValueError, match=r"`t` holds .*expected times from"):
            objective.loss(torch.ones(1, 2), clean=torch.ones(1, 2), noise=torch.ones(1, 2), t=torch.tensor([t]))


# --- features as large as float16 holds -------------------------------------------------------------------------------


def weighed(f, g):
    """A distance of the user's, with a weight for each channel."""
    weight = torch.linspace(0.1, 10, f.shape[1], dtype=f.dtype)
    return (weight[:, None, None] * (f - g).square()).flatten(1).mean(1)


@pytest.mark.parametrize("size", [1.0, 1e3, 6e4, "mixed"])
@pytest.mark.parametrize("name", [*distances.NAMED, weighed], ids=lambda name: getattr(name, "__name__", name))
def test_features_up_to_6e4_in_float16_give_a_finite_loss_and_the_right_gradient(name, size):
    """Squared in float16 such a difference is infinite, and the gradient of a mean is 0."""
    sizes = torch.tensor([6e4, 1e2, 3e3, 1.0]) if size == "mixed" else torch.full((4,), size)
    scale = sizes.view(-1, 1, 1, 1)
    found = []
    for dtype in (torch.float16, torch.float64):

        def teacher(x, t, cond, dtype=dtype):
            features = torch.tanh(x).to(torch.float16).to(dtype)  # as many digits in both
            return [features * scale.to(dtype)]

        objective = PaperObjective(
            schedule=Linear(), prediction="v_prediction", teacher=teacher, distance=name, nonfinite="raise",
            weight=lambda t: 1 + t,
        )  # fmt: skip
        clean, noise, prediction = torch.randn(3, 4, 8, 5, 5, generator=torch.Generator().manual_seed(0))
        prediction.requires_grad_()
        t, t_prime = torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0.7, 0.9, 0.1, 0.3])
        losses = objective.loss(prediction, clean=clean, noise=noise, t=t, t_prime=t_prime, reduction="none")
        losses.sum().backward()
        assert losses.dtype == (torch.float32 if dtype == torch.float16 else torch.float64)
        found.append((losses.detach(), prediction.grad))
    for row in range(4):
        assert found[0][1][row].isfinite().all()
        for low, high in zip(*found, strict=True):
            assert distance(low[row], high[row]) < 0.01, row
