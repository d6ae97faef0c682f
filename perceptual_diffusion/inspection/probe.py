"""Measure the layers of a model as places to compare features: what they hold, what they answer to, what they would train.

The model's middle is an open question where there is no bottleneck. For each layer, on a batch and over bands of time:

- its features: scale, the share of energy in the largest channel, the effective rank (Σλ)² / Σλ² of their covariance;
- their sensitivity: how far they move when the clean sample is changed in a way that matters, over how far they move when
  white noise of the same norm is added instead;
- the gradient of L_sp (eq. 12) with respect to the prediction: its norm over that of L_mse, and the cosine of the two.

It ranks by sensitivity. That says what a layer sees, not that a model trained on it makes better samples.
"""

import json
import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from perceptual_diffusion import taps
from perceptual_diffusion._shapes import batch_size, check_sample, first, map_leaves
from perceptual_diffusion.inspection.blocks import Block, trace
from perceptual_diffusion.inspection.measure import LayerRow, Round, Setting
from perceptual_diffusion.objective import SelfPerceptualObjective
from perceptual_diffusion.parameterizations import Prediction
from perceptual_diffusion.teachers import ModuleTeacher
from perceptual_diffusion.types import Cond, Distance, ModelCall, ModelOutput, Sample, TimeSampler


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Measurements of the layers of a model.

    Attributes:
        rows: one per layer, in execution order.
        skipped: layers that could not be measured, and why.
        middle: the layers that the objective would tap by itself.
        bands: the times between which each band lies, in the schedule's unit.
        samples: samples in the batch.
        draws: how often each was noised in each band.
        distance: of the gradients' L_sp.
        prediction: what the model predicts.
        seed: of noise and times.
    """

    rows: tuple[LayerRow, ...]
    skipped: dict[str, str]
    middle: tuple[str, ...]
    bands: tuple[tuple[float, float], ...]
    samples: int
    draws: int
    distance: str
    prediction: str
    seed: int

    @property
    def ranking(self) -> list[str]:
        """Names of the layers, those that answer most to structure and least to noise first."""
        return [row.name for row in sorted(self.rows, key=lambda row: -(row.structure or 0.0))]

    def table(self) -> str:
        """Give the rows as text, in execution order."""
        from perceptual_diffusion.inspection.plot import table

        return table(self)

    def to_json(self) -> str:
        """Give everything as JSON."""
        return json.dumps({**asdict(self), "ranking": self.ranking}, indent=1, allow_nan=False)

    def plot(self, path: str | Path) -> None:
        """Draw sensitivity, features, gradients and cosines over the layers into a picture file (PNG, SVG, PDF).

        Raises:
            ModuleNotFoundError: matplotlib is missing.
        """
        from perceptual_diffusion.inspection.plot import plot

        plot(self, path)


def probe_layers(
    model: Any,
    clean: Sample,
    *,
    schedule: Any,
    prediction: str | Prediction | None = None,
    cond: Cond | None = None,
    layers: str | list[str] | tuple[str, ...] | None = None,
    call: ModelCall | None = None,
    output: ModelOutput | None = None,
    t_prime: str | TimeSampler = "uniform",
    distance: str | Distance = "mse",
    t_range: tuple[float, float] | None = None,
    bands: int = 4,
    draws: int = 2,
    spatial: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Probe:
    """Measure the layers of a model on a batch of its data. The model is left as it is; a frozen copy of it is run.

    Args:
        model: the trained model.
        clean: x_0, shape (B, *), or nested where the model's sample is.
        schedule: as in `SelfPerceptualObjective.wrap`, like all but the following.
        prediction: what the model predicts.
        cond: the model's own keyword arguments.
        layers: dotted names; by default the elements of the model's lists on the noisy sample's path, and its middle.
        call: `(model, x_t, t, cond) -> output`.
        output: `(output, x_t) -> prediction`.
        t_prime: sampler of t' in L_sp.
        distance: of L_sp; the paper's by default, and not that of `wrap`.
        t_range: the smallest and the largest t; by default all of the schedule.
        bands: number of bands into which the times are cut, equal in rank.
        draws: how often each sample is noised in each band.
        spatial: the dimensions of `clean` that are space, to blur, shift and occlude; by default the last two, or the longer
            of dims 1 and 2 where there are three. Vectors and nested samples are only changed by the model's own error.
        seed: of noise and times.

    Returns:
        the measurements.

    Raises:
        ValueError: what `wrap` raises, or a number is out of range, or no layer could be measured.
        TypeError: an argument has the wrong type.
    """
    check_sample("clean", clean)
    for name, value in (("bands", bands), ("draws", draws)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` is {value!r}, expected a whole number of at least 1.")
    names = (layers,) if isinstance(layers, str) else None if layers is None else tuple(layers)
    base = SelfPerceptualObjective.wrap(
        model,
        schedule,
        prediction=prediction,
        layers=None if names is None else names[:1],
        call=call,
        output=output,
        t_prime=t_prime,
        distance=distance,
        t_range=t_range,
        seed=seed,
        truncate=False,
    )
    teacher = base.teacher
    if not isinstance(teacher, ModuleTeacher):
        raise TypeError(f"the teacher is a {type(teacher).__name__}, expected a copy of the model.")
    setting = Setting(
        base=base,
        clean=clean,
        cond=dict(cond or {}),
        bands=bands,
        spatial=spatial,
        generator=torch.Generator(first(clean).device).manual_seed(seed),
    )
    edges = _edges(base, bands)
    rounds = [setting.round(teacher.module, k, *ends) for k, ends in enumerate(edges) for _ in range(draws)]
    blocks = _candidates(teacher, setting, rounds[len(rounds) // 2], names)
    rows, skipped = [], {}
    for block in blocks:
        tap = ModuleTeacher(
            teacher.module, layers=(block.name,), call=teacher.call, select=teacher.select, features=teacher.features
        )
        try:
            rows.append(setting.measure(block, tap, rounds))
        except ValueError as error:  # it gives nothing of the sample's, or no gradient to it
            skipped[block.name] = str(error)
    if not rows:
        raise ValueError(
            f"no layer could be measured: {skipped or 'none lies on the path of the sample'}. Pass `layers=`."
        )
    return Probe(
        rows=tuple(rows),
        skipped=skipped,
        middle=() if names is not None else teacher.layers,
        bands=tuple(edges),
        samples=batch_size(clean),
        draws=draws,
        distance=distance if isinstance(distance, str) else getattr(distance, "__name__", repr(distance)),
        prediction=base.prediction.name,
        seed=seed,
    )


def _edges(base: SelfPerceptualObjective, bands: int) -> list[tuple[float, float]]:
    """The ends of the bands: equal parts, by rank, of the times at which schedule and prediction are regular."""
    schedule = base.schedule
    least, most = schedule.drawn
    start, end = schedule.ranks(max(base.t_range[0], least), min(base.t_range[1], most))
    ranks = torch.linspace(start, end, bands + 1, dtype=torch.float64)
    times = [min(max(float(time), least), most) for time in schedule.at(ranks)]
    return list(pairwise(times))


def _candidates(teacher: ModuleTeacher, setting: Setting, at: Round, layers: tuple[str, ...] | None) -> list[Block]:
    """The blocks to measure: those named, else the elements of lists on the sample's path, and the middle."""
    x_t = map_leaves(lambda x: x.detach().clone(), at.x_t)
    blocks = trace(teacher.module, lambda: teacher.call(teacher.module, x_t, at.t, setting.cond), sample=x_t)
    if layers is None:
        return [
            block
            for block in blocks
            if block.noisy and (block.name in teacher.layers or any(part.isdigit() for part in block.name.split(".")))
        ]
    found = {block.name: block for block in blocks}
    return [found.get(name) or _unlisted(teacher, name) for name in layers]


def _unlisted(teacher: ModuleTeacher, name: str) -> Block:
    """A layer inside or beside the blocks that are listed."""
    module = taps.layer(teacher.module, name)
    return Block(
        name=name, kind=type(module).__name__, shapes=(), parameters=0, parameters_share=0.0, flops=0, flops_share=0.0,
        flops_until=math.nan, noisy=None,
    )  # fmt: skip
