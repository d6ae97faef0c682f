"""Weights of the loss by time: min-SNR for every prediction, and the names."""

import pytest
import torch

from perceptual_diffusion import weights
from perceptual_diffusion.parameterizations import (
    EPSILON,
    FLOW_PREDICTION,
    SAMPLE,
    SCORE,
    V_PREDICTION,
    System,
    edm,
    recover,
)
from perceptual_diffusion.schedules import EDM, Cosine, Discrete, Interpolant, Linear
from perceptual_diffusion.weights import MinSNR

TABLE = Discrete.scaled_linear()
ZERO = Discrete.scaled_linear().zero_terminal_snr()
GAMMAS = (1.0, 5.0, 20.0)


def snr(schedule, t):
    alpha, sigma = schedule(t)
    return alpha**2 / sigma**2


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


gammas = pytest.mark.parametrize("gamma", GAMMAS)


@gammas
def test_min_snr_is_that_of_hang_et_al_on_a_table(gamma):
    """min(SNR, γ) for x_0, over SNR for ε, over SNR + 1 for v."""
    t = torch.arange(1000)
    ratio = snr(TABLE, t)
    least = ratio.clamp(max=gamma)
    assert (ratio > gamma).any()
    assert (ratio < gamma).any()
    same(MinSNR(schedule=TABLE, prediction=SAMPLE, gamma=gamma)(t), least)
    same(MinSNR(schedule=TABLE, prediction=EPSILON, gamma=gamma)(t), least / ratio)
    same(MinSNR(schedule=TABLE, prediction=V_PREDICTION, gamma=gamma)(t), least / (ratio + 1))


@gammas
def test_min_snr_of_flow_on_the_straight_path(gamma):
    """min(alpha², γ sigma²): the velocity's error times sigma is the clean sample's."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for schedule in (Linear(), Linear(3.0)):
        alpha, sigma = schedule(t)
        same(
            MinSNR(schedule=schedule, prediction=FLOW_PREDICTION, gamma=gamma)(t),
            torch.minimum(alpha**2, gamma * sigma**2),
        )


@gammas
def test_min_snr_of_v_on_the_quarter_circle_needs_no_unit_norm(gamma):
    """On a path that is not variance preserving Δ is alpha² + sigma², not 1."""
    t = torch.linspace(0.1, 0.9, 33, dtype=torch.float64)
    for schedule in (Cosine(), Linear()):
        ratio, norm = snr(schedule, t), sum(scale**2 for scale in schedule(t))
        weight = MinSNR(schedule=schedule, prediction=V_PREDICTION, gamma=gamma)(t)
        same(weight, ratio.clamp(max=gamma) / (ratio + 1) / norm)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        (schedule, prediction)
        for schedule in (TABLE, Cosine(), Linear(3.0), EDM(), Interpolant(lambda t: t, lambda t: 1 - t))
        for prediction in (EPSILON, SAMPLE, V_PREDICTION, FLOW_PREDICTION, SCORE, edm(0.5))
        if not (schedule.discrete and prediction is FLOW_PREDICTION)
    ],
)
def test_the_weighted_error_of_a_prediction_is_the_min_snr_weighted_error_of_its_clean_sample(schedule, prediction):
    t = schedule.at(torch.linspace(0.1, 0.9, 9, dtype=torch.float64))
    system = System.of(schedule, prediction, t)
    x_t, output, error = torch.randn(3, 9, dtype=torch.float64)
    clean_error = recover(x_t, output + error, system)[0] - recover(x_t, output, system)[0]
    expected = snr(schedule, t).clamp(max=5.0) * clean_error**2
    for sign, kind in ((1, prediction), (-1, -prediction)):
        weight = MinSNR(schedule=schedule, prediction=kind)(t)
        torch.testing.assert_close(weight * (sign * error) ** 2, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("prediction", [EPSILON, SAMPLE, V_PREDICTION, SCORE, edm()])
def test_min_snr_is_finite_at_every_time_of_a_zero_terminal_snr_schedule(prediction):
    weight = MinSNR(schedule=ZERO, prediction=prediction)(torch.arange(1000))
    assert weight.isfinite().all()
    assert (weight >= 0).all()


def test_min_snr_at_zero_terminal_snr_is_the_limit():
    last = torch.tensor([999])
    assert float(MinSNR(schedule=ZERO, prediction=V_PREDICTION)(last)) == 0
    assert float(MinSNR(schedule=ZERO, prediction=SAMPLE)(last)) == 0
    assert float(MinSNR(schedule=ZERO, prediction=EPSILON)(last)) == 1
    assert float(MinSNR(schedule=ZERO, prediction=SCORE)(last)) == 1  # sigma² = 1 times that of ε


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
@pytest.mark.parametrize(
    ("prediction", "clean_end", "noise_end"),
    [(EPSILON, 0.0, 1.0), (SAMPLE, 5.0, 0.0), (V_PREDICTION, 0.0, 0.0), (FLOW_PREDICTION, 0.0, 0.0)],
)
def test_min_snr_at_both_ends_of_a_path_is_the_limit(schedule, prediction, clean_end, noise_end):
    """SNR ∞ at t = 0 and 0 at t = 1 are as finite as all between."""
    weight = MinSNR(schedule=schedule, prediction=prediction)
    assert weight(torch.tensor([0.0, 1.0])).tolist() == [clean_end, noise_end]
    nearby = weight(torch.tensor([1e-7, 1 - 1e-7], dtype=torch.float64))
    assert nearby.tolist() == pytest.approx([clean_end, noise_end], abs=1e-5)


def test_gamma_is_5_by_default():
    t = torch.tensor([0])
    assert float(MinSNR(schedule=TABLE, prediction=SAMPLE)(t)) == 5.0


# Names


def test_min_snr_by_name_is_of_the_schedule_and_the_prediction():
    weight = weights.get("min_snr", TABLE, V_PREDICTION)
    assert weight == MinSNR(schedule=TABLE, prediction=V_PREDICTION, gamma=5.0)


@pytest.mark.parametrize("nothing", [None, "none"])
def test_no_weight_is_none(nothing):
    assert weights.get(nothing, TABLE, EPSILON) is None


def test_get_passes_a_callable_through():
    def mine(t):
        return t + 1

    assert weights.get(mine, TABLE, EPSILON) is mine


@pytest.mark.parametrize("gamma", [0, -1, float("inf"), float("nan"), "5", None])
def test_a_gamma_that_is_no_positive_number_is_refused(gamma):
    with pytest.raises(ValueError, match=rf"^`gamma` is {gamma!r}, expected a positive number\.$"):
        MinSNR(schedule=TABLE, prediction=EPSILON, gamma=gamma)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown weight 'snr', expected 'none', 'min_snr', or a callable"):
        weights.get("snr", TABLE, EPSILON)


@pytest.mark.parametrize("value", [3, 0.5, ["min_snr"]])
def test_what_is_neither_a_name_nor_callable_is_refused(value):
    with pytest.raises(TypeError, match=r"`weight` is .*'min_snr', or a callable of t"):
        weights.get(value, TABLE, EPSILON)
