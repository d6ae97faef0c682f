"""What is measured of one layer: its features, what moves them, and the gradient of L_sp through it."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from perceptual_diffusion import timesteps
from perceptual_diffusion._shapes import first, leaves, map_leaves, map_scaled, mean_square, over
from perceptual_diffusion.inspection.blocks import Block
from perceptual_diffusion.inspection.perturb import dot, of_norm, perturbations
from perceptual_diffusion.objective import SelfPerceptualObjective
from perceptual_diffusion.parameterizations import System
from perceptual_diffusion.renoising import prediction_error
from perceptual_diffusion.teachers import ModuleTeacher
from perceptual_diffusion.types import Feature, Sample


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """What was measured of one layer. A number that could not be measured is None.

    Attributes:
        name: dotted name.
        kind: name of its class.
        channels: number of its channels.
        until: share of the forward's operations up to and including it, 0 to 1.
        scale: root mean square of its features.
        outlier: share of their energy in the largest channel; 1 / channels if all are equal.
        rank: effective rank of their covariance over the number of channels, 0 to 1.
        sensitivity: by the kind of change, for each band: mean squared change of the features over that by white noise of
            equal norm.
        structure: geometric mean of all of `sensitivity`; the ranking.
        gradient: for each band, norm of the gradient of L_sp over that of L_mse, both with respect to the prediction.
        cosine: for each band, mean cosine of the two.
    """

    name: str
    kind: str
    channels: int
    until: float | None
    scale: float | None
    outlier: float | None
    rank: float | None
    sensitivity: dict[str, tuple[float | None, ...]]
    structure: float | None
    gradient: tuple[float | None, ...]
    cosine: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Round:
    """One noising of the batch, with the model's prediction and the changes of the sample."""

    band: int
    t: Tensor
    t_prime: Tensor
    noise: Sample
    x_t: Sample
    predicted: Sample
    changed: dict[str, tuple[Sample, Sample]]
    """By kind: the sample at t with that change, and with white noise of its norm instead."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all layers are measured on."""

    base: SelfPerceptualObjective
    clean: Sample
    cond: dict[str, Any]
    bands: int
    spatial: tuple[int, ...] | None
    generator: torch.Generator

    @torch.no_grad()
    def round(self, model: Any, band: int, low: float, high: float) -> Round:
        """Noise the batch to times of one band, predict, and change it in the ways that are compared."""
        base, like = self.base, first(self.clean)
        t = timesteps.Uniform(low=low, high=high)(base.schedule, like, generator=self.generator)
        t_prime = base.t_prime(base.schedule, like, t=t, generator=self.generator)
        noise = self._white()
        x_t = base.add_noise(self.clean, noise, t)
        predicted = base.output(base.call(model, x_t, t, self.cond), self.clean)
        system = System.of(base.schedule, base.prediction, t)
        wrong = prediction_error(predicted, self.clean, noise, system)
        scale = -system.sigma / system.determinant  # of the error in x̂_0 (eq. 8)
        error = map_scaled(lambda k, d: over(k[0], d) * d, (scale,), wrong)
        changed = {}
        for kind, change in perturbations(self.clean, error, self.spatial, self.generator).items():
            pair = change, of_norm(self._white(), change)
            changed[kind] = tuple(
                map_scaled(lambda k, x, d: (x + over(k[0], x) * d).to(x.dtype), (system.alpha,), x_t, delta)
                for delta in pair
            )
        return Round(
            band=band,
            t=t,
            t_prime=t_prime,
            noise=noise,
            x_t=x_t,
            predicted=predicted,
            changed=cast("dict[str, tuple[Sample, Sample]]", changed),
        )

    def measure(self, block: Block, tap: ModuleTeacher, rounds: list[Round]) -> LayerRow:
        """Measure one layer, of which `tap` gives the features."""
        objective = SelfPerceptualObjective(
            schedule=self.base.schedule,
            prediction=self.base.prediction,
            teacher=tap,
            output=lambda predicted, clean: predicted,
            distance=self.base.distance,
            t=self.base.t,
            t_prime="uniform",
            mse_weight=0.0,
        )
        features = _Features()
        moved: dict[str, Tensor] = {kind: torch.zeros(self.bands, 2, dtype=torch.float64) for kind in rounds[0].changed}
        norms = torch.zeros(self.bands, 2, dtype=torch.float64)
        cosines: list[list[Tensor]] = [[] for _ in range(self.bands)]
        for at in rounds:
            with torch.no_grad():
                true = tap(at.x_t, at.t, self.cond)
                features.add(true)
                for kind, pair in at.changed.items():
                    for column, sample in enumerate(pair):
                        other = tap(sample, at.t, self.cond)
                        moved[kind][at.band, column] += _gap(true, other)
            perceptual, square = _gradients(objective, self, at)
            p, s = dot(perceptual, perceptual).cpu(), dot(square, square).cpu()
            norms[at.band] += torch.stack([p.sum(), s.sum()])
            known = (p > 0) & (s > 0)
            cosines[at.band].append((dot(perceptual, square).cpu() / (p * s).sqrt())[known])
        sensitivity = {kind: tuple(_ratio(*row) for row in table.tolist()) for kind, table in moved.items()}
        ratios = [value for row in sensitivity.values() for value in row if value]
        scale, outlier, rank = features.summary()
        return LayerRow(
            name=block.name,
            kind=block.kind,
            channels=features.channels,
            until=_number(block.flops_until),
            scale=scale,
            outlier=outlier,
            rank=rank,
            sensitivity=sensitivity,
            structure=math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None,
            gradient=tuple(None if (r := _ratio(*row)) is None else math.sqrt(r) for row in norms.tolist()),
            cosine=tuple(_number(float(torch.cat(values).mean())) for values in cosines),
        )

    def _white(self) -> Sample:
        return map_leaves(
            lambda x: torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=self.generator), self.clean
        )


def _gradients(objective: SelfPerceptualObjective, setting: Setting, at: Round) -> tuple[Sample, Sample]:
    """Gradients of L_sp and of L_mse of each sample with respect to its prediction."""
    predicted = map_leaves(lambda x: x.detach().clone().requires_grad_(), at.predicted)
    with torch.enable_grad():
        loss = objective.loss(
            predicted,
            clean=setting.clean,
            noise=at.noise,
            t=at.t,
            t_prime=at.t_prime,
            cond=setting.cond,
            reduction="none",
        )
        target = objective.target(setting.clean, at.noise, at.t)
        square = mean_square(map_leaves(torch.sub, predicted, target))
        inputs = list(leaves(predicted))
        found = [torch.autograd.grad(value.sum(), inputs, materialize_grads=True) for value in (loss, square)]
    rows = [iter(gradient) for gradient in found]
    perceptual, plain = (map_leaves(lambda x, row=row: next(row), predicted) for row in rows)
    return perceptual, plain


class _Features:
    """Moments of the features of a layer, of its first stream if it has several."""

    def __init__(self) -> None:
        self.count, self.channels = 0, 0
        self.shift: Any = None
        self.total: Any = 0.0
        self.products: Any = 0.0

    def add(self, features: list[Feature]) -> None:
        """Add a batch of them: tokens (B, N, C), maps (B, C, *), or lists of such."""
        for tensor in features[0] if isinstance(features[0], list) else [features[0]]:
            channel = -1 if tensor.ndim == 3 else min(1, tensor.ndim - 1)
            rows = tensor.detach().float().movedim(channel, -1).flatten(0, -2)
            if self.shift is None:  # near the mean, which may be far larger than the deviation from it
                self.shift = rows.mean(0)
            rows = rows - self.shift
            self.count, self.channels = self.count + len(rows), rows.shape[1]
            self.total = self.total + rows.sum(0).cpu().double()
            self.products = self.products + (rows.T @ rows).cpu().double()

    def summary(self) -> tuple[float | None, float | None, float | None]:
        """Scale, share of the largest channel, and effective rank over the number of channels."""
        mean = self.total / self.count
        covariance = self.products / self.count - mean[:, None] * mean
        energy = covariance.diagonal() + (self.shift.cpu() + mean).square()
        effective = covariance.trace() ** 2 / covariance.square().sum()
        return (
            _number(float(energy.mean().sqrt())),
            _number(float(energy.max() / energy.sum())),
            _number(float(effective / self.channels)),
        )


def _gap(one: list[Feature], other: list[Feature]) -> float:
    """Squared distance of the features of a batch, over all streams and samples."""
    pairs = zip(leaves(cast(Sample, one)), leaves(cast(Sample, other)), strict=True)
    return sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)


def _ratio(above: float, below: float) -> float | None:
    return _number(above / below) if below else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
