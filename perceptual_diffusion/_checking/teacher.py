"""The teacher's part of a step: its features say something, it stays as it is, and its gradient is that of its loss."""

import copy
import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn

from perceptual_diffusion._checking.batch import Batch
from perceptual_diffusion._checking.numbers import TINY, equal, finite, inner
from perceptual_diffusion._checking.report import FeatureReport, SetupError, describe_feature, named
from perceptual_diffusion._checking.watch import Watch, acts_in_training, parameters_of_graph, same_randomness
from perceptual_diffusion._shapes import describe, first, leaves, map_leaves, map_scaled, over
from perceptual_diffusion.renoising import mix_samples, prediction_error
from perceptual_diffusion.schedules import precise
from perceptual_diffusion.types import Sample

SLOPE = 0.05
"""How far a gradient may be from the slope of the loss, relatively."""
ROUGH = 0.25
"""How far two measurements of the slope may be apart, relatively, to be trusted."""
STEPS = (0.1, 0.3, 0.03, 0.01, 0.001, 0.0001)
"""Lengths of the steps that measure the slope, in lengths of the prediction's error; the first that agrees is enough."""


class TeacherStep:
    """The teacher in one step.

    Args:
        batch: the batch.
        predicted: ŷ, without its graph.
        trained: the student's weights that are trained.
        watch: sees what the teacher runs.
    """

    def __init__(self, batch: Batch, predicted: Sample, trained: list[nn.Parameter], watch: Watch) -> None:
        self.batch, self.predicted, self.trained, self.watch = batch, predicted, trained, watch
        self.teacher = batch.objective.teacher
        self.error = prediction_error(predicted, batch.clean, batch.noise, batch.system)
        self.target = mix_samples(batch.clean, batch.noise, (batch.system.a, batch.system.b))
        self._bare = copy.copy(batch.objective)  # takes ŷ itself, gives L_sp alone, and keeps its `terms` to itself
        self._bare.output, self._bare.mse_weight = (lambda given, x_t: given), 0.0

    def features(self) -> list[FeatureReport]:
        """Look at the features of the true pair."""
        batch = self.batch
        features, others = self._pass(batch.x_tt), self._pass(batch.disturbed(batch.x_tt))
        if not isinstance(features, list | tuple) or not features or not all(map(_is_feature, features)):
            raise SetupError(
                "tap",
                f"the teacher gives {describe(features)}, expected a list of features. Tap a layer that runs in each pass.",
            )
        self._check_weights()
        layers = getattr(self.teacher, "layers", ())
        names = layers if len(layers) == len(features) else [f"feature {i}" for i in range(len(features))]
        reports = []
        for name, feature, other in zip(names, features, others, strict=False):
            if not finite(feature):
                raise SetupError(
                    "features",
                    f"{name!r} of the teacher holds NaN or infinity. Run it in float32, or tap another layer.",
                )
            if not any(bool(f.any()) for f in leaves(feature)):
                raise SetupError("features", f"{name!r} of the teacher is all zero. Tap another layer.")
            if equal(feature, other):
                raise SetupError(
                    "features",
                    f"{name!r} of the teacher does not depend on the noisy sample. Tap a layer that lies on its path, and that "
                    "runs in each pass.",
                )
            reports.append(describe_feature(str(name), feature))
            if reports[-1].outliers and reports[-1].largest_channel > 0.5:
                batch.warnings.append(
                    f"one channel of {name!r} has {reports[-1].largest_channel:.0%} of its sum of squares, so 'mse' compares "
                    "little else. Try `distance='normalised'`."
                )
        return reports

    def _pass(self, x: Sample) -> Any:
        try:
            with torch.no_grad(), same_randomness(), self.watch.looking():
                return self.teacher(x, self.batch.t_prime, self.batch.cond)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            text = str(error)
            words = {"no longer holds": "truncated", "did not run": "tap", "does not depend": "features"}
            fault = next((fault for word, fault in words.items() if word in text), "teacher")
            raise SetupError(fault, f"the teacher cannot be run on the batch: {text}") from error

    def _check_weights(self) -> None:
        """Refuse a teacher that shares the student's weights, moves, learns, or drops out."""
        if self.watch.shares(self.trained):
            raise SetupError(
                "shared",
                "the teacher runs on weights of `model` that are trained, so it would move with it. Use `teacher='copy'`.",
            )
        if self.watch.moved():
            raise SetupError(
                "moving",
                "weights of the teacher are no longer what they were in its forward, so its backward is wrong without a sign. "
                "Give it weights of its own instead of swapping or averaging them in place.",
            )
        if any(p.grad is not None for p in self.watch.parameters):
            raise SetupError(
                "unfrozen",
                "weights of the teacher receive a gradient. Call `requires_grad_(False)` on it, and keep it out of the "
                "optimizer.",
            )
        if any(m.training and acts_in_training(m) for m in self.watch.modules):
            raise SetupError(
                "training", "the teacher is in train mode, with dropout or batch norm. Call `eval()` on it."
            )

    def _loss(self, predicted: Sample) -> Tensor:
        """L_sp of a prediction, (B,)."""
        batch = self.batch
        given = {name: getattr(batch, name) for name in ("clean", "noise", "t", "t_prime", "cond", "generator")}
        with same_randomness(), self.watch.looking():
            return cast(Tensor, self._bare.loss(predicted, **given, reduction="none"))

    def losses(self) -> Tensor:
        """Give L_sp of the student's prediction, (B,); that of a perfect one is 0."""
        with torch.no_grad():
            perfect, losses = self._loss(self.target), self._loss(self.predicted)
        if not finite(losses):
            raise SetupError(
                "loss", "the loss is NaN or infinite. Run the teacher in float32, or use another `distance`."
            )
        if float(perfect.abs().max()) > 1e-3 * float(losses.abs().max()):
            self._check_weights()
            raise SetupError(
                "random",
                f"a perfect prediction has loss {float(perfect.mean()):.3g}, expected 0: the teacher differs from pass to pass. "
                "Put it into eval mode, and let nothing random or changing remain in it.",
            )
        return losses

    def gradient(self) -> Sample:
        """Give the gradient of the losses with respect to the prediction, as its own backward has it."""
        leaf = map_leaves(lambda p: p.clone().requires_grad_(), self.predicted)
        with named("no_gradient", "the teacher gives no gradient to the prediction"):
            losses = self._loss(leaf)
        self.watch.hold(parameters_of_graph(losses))
        with named("gradient", "the backward through the teacher fails"), same_randomness():
            losses.sum().backward()
        gradient = map_leaves(lambda x: torch.zeros_like(x) if x.grad is None else x.grad, leaf)
        if not any(bool(g.any()) for g in leaves(gradient)):
            raise SetupError(
                "no_gradient",
                "the loss has no gradient with respect to the prediction, so it would train nothing. Run the teacher's pass "
                "on the prediction without no_grad and without detaching.",
            )
        self._check_weights()
        if not finite(gradient):
            raise SetupError("loss", "the gradient of the loss is NaN or infinite. Run the teacher in float32.")
        return gradient

    def check_slope(self, gradient: Sample, losses: Tensor) -> None:
        """Hold the gradient against differences of the loss: along the error of the prediction, and along itself."""
        steepness, length = inner(gradient, gradient), inner(self.error, self.error)
        # along itself as far as a straight line falls to 0, but never farther than the error is long
        reach = torch.minimum(precise(losses) / steepness, (length / steepness).sqrt()).nan_to_num(0, 0, 0)
        unsure = 0.0
        for direction, scale in ((self.error, torch.ones_like(reach)), (gradient, reach)):
            each = inner(gradient, direction) * scale
            expected, size = float(each.sum()), max(float(each.abs().sum()), TINY)
            slopes: dict[float, float] = {}
            for step in STEPS[:3] if self._is_coarse() else STEPS:  # the others would be rounded away
                rise = self._loss_along(direction, step * scale) - self._loss_along(direction, -step * scale)
                slopes[step] = float(rise.sum() / (2 * step))
                if abs(slopes[step] - expected) <= SLOPE * size:
                    break
            else:
                unsure = max(unsure, self._judge([slopes[step] for step in sorted(slopes)], expected, size))
        if unsure:
            self.batch.warnings.append(
                f"the gradient of the loss could not be held against its slope, from which it differs by {unsure:.0%}: the loss "
                "is too rough. Check once with `model` and teacher in float32, without autocast."
            )

    def _loss_along(self, direction: Sample, by: Tensor) -> Tensor:
        def move(scales: tuple[Tensor], p: Tensor, d: Tensor) -> Tensor:
            return p + (over(scales[0], d) * d).to(p.dtype)

        with torch.no_grad():
            return precise(self._loss(map_scaled(move, (by,), self.predicted, direction)))

    def _judge(self, slopes: list[float], expected: float, size: float) -> float:
        """Refuse a gradient that differs from the slope where two lengths of step agree on it, and rounding cannot explain it.

        Returns:
            by how much it differs where that says nothing; else 0.
        """
        pairs = [(x, y, max(size, abs(x), abs(y))) for x, y in itertools.pairwise(slopes)]
        judged = [(abs(x - y) / most, abs((x + y) / 2 - expected) / most) for x, y, most in pairs]
        unsure, wrong = min(judged)
        if unsure <= ROUGH and wrong <= SLOPE + 2 * unsure:
            return 0.0
        if unsure > ROUGH or self._is_coarse():
            return wrong
        raise SetupError(
            "gradient",
            f"the gradient of the loss is wrong by {wrong:.0%} although the loss is right: the teacher's backward is not that of "
            "its forward. Quantise its weights only, not its activations; and let nothing in it be switched before the "
            "backward (`disable_adapter()` with checkpointing).",
        )

    def _is_coarse(self) -> bool:
        """Whether rounding alone may turn the gradient away from the slope."""
        tensors = (*leaves(self.batch.clean), *leaves(self.predicted), *self.watch.parameters)
        half = any(x.dtype in (torch.bfloat16, torch.float16) for x in tensors)
        return half or torch.is_autocast_enabled(first(self.batch.clean).device.type)


def _is_feature(value: Any) -> bool:
    parts = value if isinstance(value, list) else [value]
    return bool(parts) and all(
        isinstance(part, Tensor) and part.is_floating_point() and part.ndim > 0 for part in parts
    )
