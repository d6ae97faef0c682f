"""The predicted pair, noised to t' (Lin & Yang, eqs. 8 to 11 and 14 to 17), in closed form.

With d = ŷ − y the error of the prediction, clean_hat − clean = −(sigma / Δ) d and noise_hat − noise = (alpha / Δ) d, so
the inputs of the teacher's two passes differ by a multiple of d:

    joint:  x̂_t' − x_t' = κ d,   κ = (sigma' alpha − alpha' sigma) / Δ
    split:  −(alpha' sigma / Δ) d   and   (sigma' alpha / Δ) d

κ is exactly 0 at t' = t and d is exactly 0 for a perfect prediction. Solving for clean_hat and noise_hat would round twice.
"""

from typing import Literal

from torch import Tensor

from perceptual_diffusion._shapes import compute_dtype, map_scaled, over, result_dtype
from perceptual_diffusion.parameterizations import System, mix
from perceptual_diffusion.types import Sample

Formulation = Literal["joint", "split"]
FORMULATIONS = ("joint", "split")

Scales = tuple[Tensor, Tensor]
"""(alpha, sigma) at one time per sample, shape (B,) each."""


def mix_samples(clean: Sample, noise: Sample, scales: Scales) -> Sample:
    """Mix nested samples (B, *): scales[0] clean + scales[1] noise."""
    return map_scaled(lambda k, x, e: mix(x, e, *k), scales, clean, noise)


def prediction_error(predicted: Sample, clean: Sample, noise: Sample, system: System) -> Sample:
    """Give d = ŷ − y in float32 or better, (B, *) or nested.

    y is rounded as the model's target is, to the widest dtype given, so that a perfect prediction has exactly 0.
    """
    return map_scaled(lambda k, p, x, e: _beyond(p, x, e, k), (system.a, system.b), predicted, clean, noise)


def renoise(
    x_tt: Sample,
    error: Sample,
    *,
    system: System,
    scales: Scales,
    formulation: Formulation,
    excess: Sample | None = None,
) -> list[Sample]:
    """Noise the predicted pair to t'.

    Args:
        x_tt: the true pair at t', (B, *) or nested.
        error: d = ŷ − y, likewise.
        system: schedule and prediction at t.
        scales: (alpha', sigma') at t'.
        formulation: "joint" (clean_hat, noise_hat), or "split": (clean_hat, noise) and (clean, noise_hat).
        excess: what the model saw at t beyond alpha clean + sigma noise, likewise; None for nothing.

    Returns:
        one sample for the joint formulation, two for the split one, in float32 or better.
    """
    alpha, sigma = scales
    delta = system.determinant
    if formulation == "joint":
        of_error = [(sigma * system.alpha - alpha * system.sigma) / delta]
        of_excess = [(alpha * system.b - sigma * system.a) / delta]
    else:
        of_error = [-alpha * system.sigma / delta, sigma * system.alpha / delta]
        of_excess = [alpha * system.b / delta, -sigma * system.a / delta]
    samples = [_shift(x_tt, error, k) for k in of_error]
    if excess is not None:
        samples = [_shift(sample, excess, k) for sample, k in zip(samples, of_excess, strict=True)]
    return samples


def input_excess(x_t: Sample, clean: Sample, noise: Sample, system: System) -> Sample:
    """Give what the model saw beyond alpha_t clean + sigma_t noise, in float32 or better, (B, *) or nested."""
    return map_scaled(lambda k, s, x, e: _beyond(s, x, e, k), (system.alpha, system.sigma), x_t, clean, noise)


def _beyond(value: Tensor, clean: Tensor, noise: Tensor, scales: Scales) -> Tensor:
    wide, rounded = compute_dtype(value, clean, noise), result_dtype(value, clean, noise)
    expected = mix(clean.to(wide), noise.to(wide), *scales).to(rounded)
    return value.to(wide) - expected.to(wide)


def _shift(sample: Sample, direction: Sample, scale: Tensor) -> Sample:
    def shift(scales: tuple[Tensor], s: Tensor, d: Tensor) -> Tensor:
        wide = compute_dtype(s, d)
        return s.to(wide) + over(scales[0], d) * d

    return map_scaled(shift, (scale,), sample, direction)
