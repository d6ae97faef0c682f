"""The self-perceptual objective (Lin & Yang, arXiv 2401.00110, Algorithm 1, eqs. 10 to 17).

Draw t, noise the clean sample, predict; turn the prediction into (clean_hat, noise_hat). Draw t', noise both the true
pair and the predicted pair to t', and compare a frozen teacher's hidden features of the two:

    L = || f*(x̂_t', t', c) − f*(x_t', t', c) ||²                                                     (eq. 12)
"""

import os
import random
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from perceptual_diffusion import distances, parameterizations, staged, timesteps, weights
from perceptual_diffusion._shapes import (
    check_sample,
    describe,
    first,
    leaves,
    map_leaves,
    mean_square,
)
from perceptual_diffusion._subset import (
    Batch,
    Student,
    check_alone,
    features_of,
    nothing,
    pick,
    runs,
    standard_normal,
)
from perceptual_diffusion.checks import Report, check
from perceptual_diffusion.features import Features
from perceptual_diffusion.nonfinite import NonFinite, Step, check_policy, judge, warn
from perceptual_diffusion.parameterizations import Prediction, System
from perceptual_diffusion.renoising import (
    FORMULATIONS,
    Formulation,
    input_excess,
    mix_samples,
    prediction_error,
    renoise,
)
from perceptual_diffusion.schedules import Schedule
from perceptual_diffusion.staged import MicroBatch, MicroBatches
from perceptual_diffusion.types import (
    Cond,
    Distance,
    ModelCall,
    ModelOutput,
    Sample,
    Teacher,
    TimeFunction,
    TimeSampler,
)

Reduction = Literal["mean", "none"]

REDUCTIONS = ("mean", "none")

PAPER: MappingProxyType[str, Any] = MappingProxyType({"distance": "mse", "mse_weight": 0.0, "t_prime": "uniform"})
"""The options of the paper's objective, eq. 12 and nothing else: `wrap(model, schedule, **PAPER)`."""

_assemble: Callable[..., dict[str, Any]] | None = None


def install(assemble: Callable[..., dict[str, Any]]) -> None:
    """Set what turns the arguments of `wrap` into those of the constructor. The adapters, the outer ring, call this."""
    global _assemble
    _assemble = assemble


def call_model(model: Any, x_t: Any, t: Tensor, cond: Cond, /) -> Any:
    """Call a model as `model(x_t, t, **cond)`."""
    return model(x_t, t, **cond)


def take_prediction(output: Any, x_t: Sample) -> Sample:
    """Take the prediction out of a model's output: itself, its `.sample`, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "sample"):
        return output.sample  # type: ignore[no-any-return]
    if isinstance(output, tuple | list) and isinstance(x_t, Tensor) and len(output):
        return output[0]  # type: ignore[no-any-return]
    return output  # type: ignore[no-any-return]


class SelfPerceptualObjective:
    """A perceptual training loss for a diffusion or flow model, made by the model's own frozen copy.

    `SelfPerceptualObjective.wrap(model, schedule)` builds one for a model. It is a plain object, not a module: nothing
    of it enters a `state_dict`, `parameters()`, DDP or EMA. The defaults are the recipe that helped where it was measured
    (docs/decisions/0015-the-defaults-are-what-helped.md); `PAPER` holds those of the paper.

    Args:
        schedule: the noise schedule.
        prediction: what the model predicts, a name or a `parameterizations.Prediction`.
        teacher: f*, `(x_t, t, cond) -> list of features`, with a gradient to x_t.
        call: runs the student: `(model, x_t, t, cond) -> output`, t in the schedule's unit, shape (B,).
        output: takes the prediction out of the student's output.
        t: sampler of t: "uniform", "logit_normal", or a callable.
        t_prime: sampler of t': "uniform", "near", "shifted", "logit_normal", or a callable; "contributing" draws those
            times more often that contribute more, and weights them for the expectation to be that of "uniform"; "clean"
            compares x̂_0 and x_0 without noising them again, for teachers that are no denoisers.
        distance: "mse", "mae", "huber", "cosine", "normalised", or a callable of two features (B, *) to (B,), each row of which
            depends on that row of the features alone.
        formulation: "joint" (eq. 12) or "split" (eqs. 14 to 17).
        mse_weight: adds this much of the MSE of the prediction; it costs no extra pass. 0 where the loop adds its own.
        weight: weight of each sample by t: "none", "min_snr", or a callable of t, shape (B,), to (B,).
        t_range: the smallest and the largest t; by default all of the schedule.
        seed: seed of the objective's own generator; each process adds its rank. By default torch's initial seed.
        micro_batch: how many samples go through the teacher at a time; what it keeps for its backward is freed before the
            next. "auto": as many as keep that below a 32nd of the device's memory. None: plain autograd through the
            teacher, which can be differentiated twice and keeps everything until the student's backward.
        nonfinite: what is done about samples whose loss, or its gradient to the prediction, is NaN or infinite. "propagate":
            nothing, at no host sync. "raise": a `nonfinite.NonFiniteError` that says which and where it begins. "skip": the
            step is made again without them, and their mean is that of the others; one `NonFiniteWarning`, and `left_out`.

    Raises:
        ValueError: a name is unknown, a number is out of range, or schedule and prediction are singular somewhere in
            `t_range`.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        prediction: str | Prediction,
        teacher: Teacher,
        call: ModelCall = call_model,
        output: ModelOutput = take_prediction,
        t: str | TimeSampler = "uniform",
        t_prime: str | TimeSampler = "contributing",
        distance: str | Distance = "normalised",
        formulation: Formulation = "joint",
        mse_weight: float = 1.0,
        weight: str | TimeFunction | None = None,
        t_range: tuple[float, float] | None = None,
        seed: int | None = None,
        micro_batch: MicroBatch = "auto",
        nonfinite: NonFinite = "propagate",
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"`schedule` is a {type(schedule).__name__}, expected a diffusers scheduler or a schedule of "
                "perceptual_diffusion.schedules. A pair of functions goes into `schedules.Interpolant(alpha, sigma)`."
            )
        if formulation not in FORMULATIONS:
            raise ValueError(f"unknown formulation {formulation!r}, expected 'joint' or 'split'.")
        if not (isinstance(mse_weight, int | float) and 0 <= mse_weight < float("inf")):
            raise ValueError(f"`mse_weight` is {mse_weight!r}, expected a number of at least 0.")
        if not callable(teacher):
            raise TypeError(
                f"`teacher` is a {type(teacher).__name__}, expected a callable `(x_t, t, cond) -> features`."
            )
        self.schedule, self.prediction, self.teacher = schedule, parameterizations.get(prediction), teacher
        self.call, self.output = call, output
        for name, value in (("call", call), ("output", output)):
            if not callable(value):
                raise TypeError(f"`{name}` is {value!r}, expected a callable.")
        if not (seed is None or isinstance(seed, int)):
            raise TypeError(f"`seed` is {seed!r}, expected an int, or None for torch's initial seed.")
        sampler = timesteps.get("t", t)
        low, high = _check_range(schedule, t_range)
        self.t = timesteps.within(sampler, low, high) if t_range is not None else sampler
        if t_range is None and isinstance(sampler, timesteps.Uniform):
            low, high = _regular_part(schedule, self.prediction, sampler)
        parameterizations.check_regular(schedule, self.prediction, low, high)
        self.t_range = low, high
        self.t_prime = timesteps.get("t_prime", t_prime)
        self.distance = distances.get(distance)
        self.formulation, self.mse_weight = formulation, float(mse_weight)
        self.weight = weights.get(weight, schedule, self.prediction)
        self.seed = seed
        self.micro_batches = None if micro_batch is None else MicroBatches(micro_batch)
        self.nonfinite = check_policy(nonfinite)
        self.terms: dict[str, Tensor] = {}
        """The last call's L_sp and L_mse, detached, shape (B,) each: for logging."""
        self.times: dict[str, Tensor] = {}
        """The last call's t and t_prime, shape (B,) each."""
        self.left_out: dict[int, str] = {}
        """The samples that the last call left out (`nonfinite="skip"`), and where what is not finite begins; `terms` and
        `times` are without them."""
        self._generator: torch.Generator | None = None

    @classmethod
    def wrap(
        cls,
        model: Any,
        schedule: Any = None,
        *,
        prediction: str | Prediction | None = None,
        layers: str | list[str] | tuple[str, ...] | None = None,
        call: ModelCall | None = None,
        output: ModelOutput | None = None,
        teacher: Any = "copy",
        features: Features = "noisy",
        t: str | TimeSampler | None = None,
        t_prime: str | TimeSampler | None = None,
        distance: str | Distance = "normalised",
        formulation: Formulation = "joint",
        mse_weight: float = 1.0,
        weight: str | TimeFunction | None = None,
        t_range: tuple[float, float] | None = None,
        seed: int | None = None,
        micro_batch: MicroBatch = "auto",
        nonfinite: NonFinite = "propagate",
        teacher_dtype: torch.dtype | None = None,
        compile: bool | Mapping[str, Any] = False,
        example: tuple[Sample, Cond | None] | None = None,
        truncate: bool = True,
    ) -> Self:
        """Build the objective of a model. Call it while the model's weights are the MSE-trained ones.

        Args:
            model: the student. Its family, if known, says how it is called and where its middle is; else a general rule
                finds the middle. Or a diffusers pipeline, for its denoiser and its scheduler.
            schedule: a diffusers scheduler, or a schedule of `perceptual_diffusion.schedules`.
            prediction: what the model predicts; by default what the scheduler says.
            layers: dotted names of the layers to compare; by default the model's middle. The loss is the mean of theirs.
            call: `(model, x_t, t, cond) -> output`, t in the schedule's unit, shape (B,); by default the family's.
            output: `(output, x_t) -> prediction`; by default the family's.
            teacher: "copy" (a frozen copy of `model`), "lora" (the base under LoRA layers, whose weights it shares), another
                module with those layers (it is frozen and put into `eval()` in place), or a callable
                `(x_t, t, cond) -> list of features`.
            features: "noisy" compares the noisy sample's tokens and streams, "all" whatever depends on the noisy sample.
            t: as in the constructor; by default uniform, with the scheduler's shift if it has one.
            t_prime: as in the constructor, like all that follow; by default what the teacher's `t_prime` says, else "contributing".
            distance: see the constructor.
            formulation: see the constructor.
            mse_weight: see the constructor.
            weight: see the constructor.
            t_range: see the constructor.
            seed: see the constructor.
            micro_batch: see the constructor.
            nonfinite: see the constructor.
            teacher_dtype: floating dtype of the copy's weights; by default the model's. Half precision halves its memory, and
                rounds the gradient, by most where t' is near t.
            compile: run the teacher as one graph of torch.compile, whose arguments a dict holds.
            example: a batch as the objective is given it, `(clean, cond)`, with every condition that is used later: the copy
                then allocates only what a pass on it uses. Models of diffusers whose inputs can be made up need none.
            truncate: let the copy leave out what no pass up to the layers runs.

        Returns:
            the objective.

        Raises:
            ValueError: model or scheduler are unknown and an argument is missing (the message names it), or an
                argument is wrong.
            TypeError: an argument has the wrong type.
        """
        if _assemble is None:
            raise RuntimeError("no adapters are installed. Import `perceptual_diffusion`, not one of its files.")
        built = _assemble(
            model,
            schedule,
            prediction=prediction,
            layers=layers,
            call=call,
            output=output,
            teacher=teacher,
            t=t,
            features=features,
            truncate=truncate,
            teacher_dtype=teacher_dtype,
            compile=compile,
            example=example,
        )
        return cls(
            **built,
            t_prime=getattr(teacher, "t_prime", "contributing") if t_prime is None else t_prime,
            distance=distance,
            formulation=formulation,
            mse_weight=mse_weight,
            weight=weight,
            t_range=t_range,
            seed=seed,
            micro_batch=micro_batch,
            nonfinite=nonfinite,
        )

    def __call__(
        self,
        model: Any,
        clean: Sample,
        *,
        cond: Cond | None = None,
        noise: Sample | None = None,
        t: Tensor | None = None,
        t_prime: Tensor | None = None,
        reduction: Reduction = "mean",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Run the whole of Algorithm 1: draw t, noise and t', call the model, compare.

        Args:
            model: the student, also inside DDP or torch.compile.
            clean: x_0, shape (B, *), or nested where the model's sample is.
            cond: the model's own keyword arguments.
            noise: ε, as `clean`; drawn by default.
            t: times in the schedule's unit, shape (B,); drawn by default.
            t_prime: the second times, shape (B,); drawn by default.
            reduction: "mean" for a scalar, "none" for one loss per sample, shape (B,).
            generator: draws what is not given; by default the objective's own.

        Returns:
            the loss, float32 or better.

        Raises:
            ValueError: shapes, times or names are wrong.
            TypeError: an argument has the wrong type.
        """
        _check_reduction(reduction)
        check_sample("clean", clean)
        like, cond = first(clean), _check_cond(cond)
        generator = self._source(like, generator)
        self._check_times(({} if t is None else {"t": t}) | {"t_prime": t_prime}, like)
        if t is None:
            t = self._draw("t", self.t, like, None, generator)
        if noise is None:
            noise = standard_normal(clean, generator)
        else:
            check_sample("noise", noise, clean)

        def run(model: Any, x_t: Sample, t: Tensor, cond: Cond) -> Sample:
            return self.output(self.call(model, x_t, t, cond), x_t)

        student = Student(model, run, like.device) if self.nonfinite == "skip" else None

        batch = self._batch(clean, noise, t, cond, t_prime, None, generator)

        def predict(part: Batch) -> Sample:
            given = self._seen(part), part.t, part.cond
            return run(model, *given) if student is None or part is batch else student.again(*given)

        return self._loss(predict, batch, reduction, student)

    def loss(
        self,
        model_pred: Any,
        *,
        clean: Sample,
        noise: Sample,
        t: Tensor,
        cond: Cond | None = None,
        t_prime: Tensor | None = None,
        x_t: Sample | None = None,
        reduction: Reduction = "mean",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Give the loss of a prediction that the training loop has made itself.

        Args:
            model_pred: the model's output, with its graph; for a plain tensor model ŷ of shape (B, *).
            clean: x_0, shape (B, *), or nested where the model's sample is.
            noise: ε, as `clean`.
            t: the times at which the model predicted, in the schedule's unit, shape (B,).
            cond: the model's own keyword arguments, as they were in the prediction.
            t_prime: the second times, shape (B,); drawn by default.
            x_t: what the model saw, if it was not alpha_t clean + sigma_t noise (eq. 8 is then solved for it).
            reduction: "mean" for a scalar, "none" for one loss per sample, shape (B,).
            generator: draws t'; by default the objective's own.

        Returns:
            the loss, float32 or better.

        Raises:
            ValueError: shapes, times or names are wrong.
            TypeError: an argument has the wrong type.
        """
        _check_reduction(reduction)
        check_sample("clean", clean)
        check_sample("noise", noise, clean)
        self._check_times({"t": t, "t_prime": t_prime}, first(clean))
        if x_t is not None:
            check_sample("x_t", x_t, clean)
        generator, cond = self._source(first(clean), generator), _check_cond(cond)

        predicted = self.output(model_pred, clean)
        batch = self._batch(clean, noise, t, cond, t_prime, x_t, generator)
        return self._loss(
            lambda part: predicted if part is batch else pick(predicted, runs(part.rows)), batch, reduction, None
        )

    def add_noise(self, clean: Sample, noise: Sample, t: Tensor) -> Sample:
        """Give x_t = alpha_t clean + sigma_t noise (eq. 2), shape (B, *), for times t of shape (B,)."""
        check_sample("clean", clean)
        check_sample("noise", noise, clean)
        self._check_times({"t": t}, first(clean))
        return mix_samples(clean, noise, self.schedule(t))

    def target(self, clean: Sample, noise: Sample, t: Tensor) -> Sample:
        """Give what the model is trained to predict, y = a_t clean + b_t noise, shape (B, *), for times t of shape (B,)."""
        check_sample("clean", clean)
        check_sample("noise", noise, clean)
        self._check_times({"t": t}, first(clean))
        return mix_samples(clean, noise, self.prediction.row(self.schedule, t))

    def check(
        self, model: Any, clean: Sample, *, cond: Cond | None = None, generator: torch.Generator | None = None
    ) -> Report:
        """Try one training step on a batch, leave everything as it was, and raise a `checks.SetupError` if it is wrong.

        Args:
            model: the student.
            clean: a batch of training data, shape (B, *), or nested where the model's sample is.
            cond: the model's own keyword arguments.
            generator: draws t, noise and t'; by default one of the check's own, with a fixed seed.

        Returns:
            what was measured, to be printed.

        Raises:
            SetupError: the set-up is wrong; `fault` names the kind (`checks.FAULTS`), the message says what to do.
            ValueError: the structure of `clean` is wrong.
            TypeError: an argument has the wrong type.
        """
        return check(self, model, clean, cond=cond, generator=generator)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the teacher, as `nn.Module.to` does, and return the objective."""
        move = getattr(self.teacher, "to", None)
        if move is not None:
            move(*args, **kwargs)
        return self

    def rng_state(self) -> Tensor | None:
        """Give the state of the objective's own generator, uint8, to be saved with the run; None before its first use."""
        return None if self._generator is None else self._generator.get_state()

    def set_rng_state(self, state: Tensor | None, device: torch.device | str = "cpu") -> None:
        """Continue the objective's own generator from a saved state, on the device it was used on."""
        if state is None:
            self._generator = None
            return
        if not isinstance(state, Tensor):
            raise TypeError(f"`state` is {state!r}, expected what `rng_state` gave, a uint8 tensor, or None.")
        try:
            generator = torch.Generator(device)
            generator.set_state(state.cpu())
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"`state` is no state of a generator on `device` {device!r}: {str(error).rstrip('.')}. Pass what `rng_state` gave there."
            ) from error
        self._generator = generator

    def _batch(
        self,
        clean: Sample,
        noise: Sample,
        t: Tensor,
        cond: Cond,
        t_prime: Tensor | None,
        x_t: Sample | None,
        generator: torch.Generator,
    ) -> Batch:
        like, importance = first(clean), None
        if t_prime is None:
            t_prime = self._draw("t_prime", self.t_prime, like, t, generator)
            if isinstance(self.t_prime, timesteps.Contributing):
                importance = self.t_prime.weight(self.schedule, t, t_prime)
        return Batch(
            rows=list(range(len(like))),
            clean=clean,
            noise=noise,
            t=t,
            t_prime=t_prime,
            cond=cond,
            x_t=x_t,
            importance=importance,
        )

    def _seen(self, batch: Batch) -> Sample:
        """What the student is given."""
        return mix_samples(batch.clean, batch.noise, self.schedule(batch.t)) if batch.x_t is None else batch.x_t

    def _loss(
        self, predict: Callable[[Batch], Sample], whole: Batch, reduction: Reduction, student: Student | None
    ) -> Tensor:
        """Give the loss; `predict` gives the student's prediction of the batch, or of some of its samples."""
        looks = [features_of(self.teacher)] if student is None else [features_of(self.teacher), student.look]
        if self.nonfinite == "skip":
            check_alone("teacher", getattr(self.teacher, "module", None))
        batch, left_out = whole, dict[int, str]()
        step: Step | None = self._step(predict(batch), batch)
        while self.nonfinite != "propagate" and step is not None and (bad := step.bad()):
            where = judge(self.nonfinite, step, batch, self._seen(batch), bad, self.teacher, again=student is not None)
            left_out |= {batch.rows[i]: began for i, began in where.items()}
            step = None  # frees the graph of the step that was in vain
            batch = batch.without(where, looks)
            if batch.rows:
                step = self._step(predict(batch), batch)
        if step is None:
            given = leaves(predict(whole)) if student is None else student.weights()
            losses = nothing(given, whole.t.device).expand(0)
            self.terms = {"sp": losses.detach(), "mse": losses.detach()}
        else:
            losses = step.losses
            self.terms = {"sp": step.perceptual.detach(), "mse": step.mse.detach()}
        self.times = {"t": batch.t.detach(), "t_prime": batch.t_prime.detach()}
        self.left_out = left_out
        if left_out:
            warn(left_out, whole)
        if reduction == "mean":
            return losses.sum() / max(1, len(losses))
        if not left_out:
            return losses
        rows = torch.tensor(batch.rows, dtype=torch.long, device=losses.device)
        return losses.new_zeros(len(whole.rows)).index_put((rows,), losses)

    def _step(self, predicted: Sample, batch: Batch) -> Step:
        check_sample("model_pred", predicted, batch.clean)
        if self.nonfinite != "propagate":  # an alias: to look at its gradient wakes no hook on the student's own output
            predicted = map_leaves(lambda x: x.view_as(x), predicted)
        system = System.of(self.schedule, self.prediction, batch.t)
        error = prediction_error(predicted, batch.clean, batch.noise, system)
        excess = None if batch.x_t is None else input_excess(batch.x_t, batch.clean, batch.noise, system)
        scales = self.schedule(batch.t_prime)
        if isinstance(self.t_prime, timesteps.Clean):
            scales = torch.ones_like(scales[0]), torch.zeros_like(scales[1])
        x_tt = mix_samples(batch.clean, batch.noise, scales)
        samples = renoise(x_tt, error, system=system, scales=scales, formulation=self.formulation, excess=excess)
        perceptual = staged.perceptual(
            self.teacher,
            samples,
            x_tt,
            batch.t_prime,
            batch.cond,
            distance=self.distance,
            micro_batches=self.micro_batches,
        )
        if batch.importance is not None:
            perceptual = perceptual * batch.importance.to(perceptual.dtype)
        mse = mean_square(error)
        losses = perceptual + self.mse_weight * mse if self.mse_weight else perceptual
        if self.weight is not None:
            losses = losses * self._weigh(self.weight, batch.t).to(losses.dtype)
        return Step(predicted=predicted, x_tt=x_tt, samples=samples, perceptual=perceptual, mse=mse, losses=losses)

    def _weigh(self, weight: TimeFunction, t: Tensor) -> Tensor:
        value = weight(t)
        if not isinstance(value, Tensor) or value.shape != t.shape:
            raise ValueError(
                f"`weight` gives {describe(value)}, expected one weight per sample, shape {tuple(t.shape)}."
            )
        return value

    def _check_times(self, times: Mapping[str, Any], like: Tensor) -> None:
        """Look at times that are given; `t_prime` may be None."""
        given = {name: value for name, value in times.items() if name == "t" or value is not None}
        bounds = self.t_range if "t" in given else (None, None)
        self.schedule.check_together(given, len(like), like.device, *bounds)

    def _draw(
        self, name: str, sampler: TimeSampler, like: Tensor, t: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        try:
            drawn = sampler(self.schedule, like, t=t, generator=generator)
        except StopIteration as error:  # which would end a `map` around the objective in silence
            raise ValueError(
                f"the sampler of `{name}` has run out: it raised StopIteration. Pass one that draws in every call."
            ) from error
        if type(sampler).__module__ != timesteps.__name__:  # a callable of the user's
            bounds = self.t_range if name == "t" else (None, None)
            self.schedule.check(name, drawn, len(like), like.device, *bounds)
        return drawn

    def _source(self, like: Tensor, generator: torch.Generator | None) -> torch.Generator:
        """The generator given, or the objective's own, on the device of the sample."""
        if generator is not None:
            if not isinstance(generator, torch.Generator):
                raise TypeError(f"`generator` is a {type(generator).__name__}, expected a torch.Generator.")
            if generator.device.type != like.device.type:
                raise ValueError(
                    f"`generator` is on {generator.device}, expected {like.device}, the device of `clean`."
                )
            return generator
        if self._generator is None or self._generator.device.type != like.device.type:
            seed = torch.initial_seed() if self.seed is None else self.seed
            self._generator = torch.Generator(like.device).manual_seed(_stream(seed, _process_rank()))
        return self._generator


def _check_range(schedule: Schedule, t_range: tuple[float, float] | None) -> tuple[float, float]:
    if t_range is None:
        return schedule.low, schedule.high
    try:
        low, high = (float(end) for end in t_range)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`t_range` is {t_range!r}, expected a pair (low, high) of times.") from error
    least, most = schedule.drawn
    if not least <= low < high <= most:
        raise ValueError(f"`t_range` is {t_range!r}, expected {least:g} <= low < high <= {most:g}.")
    return low, high


def _regular_part(schedule: Schedule, prediction: Prediction, sampler: timesteps.Uniform) -> tuple[float, float]:
    """The whole schedule, or if it is singular somewhere, the part of it that the sampler draws."""
    try:
        parameterizations.check_regular(schedule, prediction, schedule.low, schedule.high)
    except ValueError:
        low = schedule.low if sampler.low is None else sampler.low
        return low, schedule.high if sampler.high is None else sampler.high
    return schedule.low, schedule.high


def _check_reduction(reduction: Any) -> None:
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}, expected 'mean' or 'none'.")


def _check_cond(cond: Any) -> Cond:
    if cond is None:
        return {}
    if not isinstance(cond, Mapping):
        raise TypeError(
            f"`cond` is a {type(cond).__name__}, expected a mapping of the model's keyword arguments, such as "
            "`{'encoder_hidden_states': text}`."
        )
    return cond


def _stream(seed: int, rank: int) -> int:
    """A seed of the objective's own: neither torch's stream of the same seed nor another rank's."""
    return random.Random(f"perceptual-diffusion {seed} {rank}").getrandbits(63)


def _process_rank() -> int:
    """This process' rank: of torch.distributed, else of the launcher, else 0."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0
