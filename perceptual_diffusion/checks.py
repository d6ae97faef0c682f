"""Find a wrong set-up before training starts: one training step without its update, and what it must obey.

Most faults of this objective leave the loss right and its gradient wrong, or leave both finite and meaningless. So the
step is held against what must be true of it: a perfect prediction has loss 0, the teacher stays as it is and learns
nothing, the gradient is the slope of the loss, and a trained student knows more of the clean sample than x_t shows.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perceptual_diffusion._checking import knowledge
from perceptual_diffusion._checking.batch import Batch
from perceptual_diffusion._checking.numbers import TINY, finite, mean
from perceptual_diffusion._checking.report import FAULTS, FeatureReport, Report, SetupError
from perceptual_diffusion._checking.student import Student, trained_weights
from perceptual_diffusion._checking.teacher import TeacherStep
from perceptual_diffusion._checking.watch import Watch, untouched
from perceptual_diffusion._shapes import OWN_SEED, check_sample, first, map_leaves
from perceptual_diffusion.types import Cond, Sample

__all__ = ["FAULTS", "FeatureReport", "Report", "SetupError", "check"]


def check(
    objective: Any, model: Any, clean: Sample, *, cond: Cond | None = None, generator: torch.Generator | None = None
) -> Report:
    """Try one training step on a batch and raise if the set-up is wrong. Everything is left as it was.

    It makes one step of Algorithm 1 (student, loss, backward), about ten more evaluations of the loss, and a few passes of
    the student without grad. Weights, gradients, buffers, modes, random streams and the teacher are afterwards what they
    were; meanwhile it needs memory for the gradients and for a copy of the weights that are trained. Call it in the mode
    and under the autocast of training, on a batch of training data, before FSDP or ZeRO partitions the model.

    Whether prediction, times and schedule are the ones of the student's training shows only as far as the student knows its
    data. Measured on the packaged model, with eight samples: a wrong sign or kind of prediction and a wrong unit of time are
    named in (nearly) every batch, as is a schedule of another shape (cosine, the linear path). Betas that are linear
    instead of scaled-linear are noticed in a quarter to half of the batches; whether the terminal SNR is zero, never. With
    one sample a wrong sign is always named, the others where t lies away from the ends of the schedule, and schedules are
    not compared below four. An untrained student tells nothing of this, and a warning says so.

    The gradient is held against differences of the loss, so an error below about 15 % of its norm passes. In half precision
    and under autocast a gradient that does not fit them is a warning.

    Args:
        objective: the `SelfPerceptualObjective`.
        model: the student.
        clean: a batch of training data, shape (B, *) or nested.
        cond: the model's keyword arguments for it.
        generator: draws t, noise and t'; by default one of the check's own, with a fixed seed.

    Returns:
        what was measured.

    Raises:
        SetupError: the set-up is wrong; `fault` names the kind, the message says what to do.
        ValueError: the structure of `clean` is wrong.
        TypeError: an argument has the wrong type.
    """
    check_sample("clean", clean)
    if not (cond is None or isinstance(cond, Mapping)):
        raise TypeError(f"`cond` is a {type(cond).__name__}, expected a mapping of the model's keyword arguments.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a {type(model).__name__}, expected the student, a torch.nn.Module.")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module  # what happens here is of this process alone
    if not finite(clean):
        raise SetupError("clean", "`clean` holds NaN or infinity. Mend the data.")
    if generator is None:
        generator = torch.Generator(first(clean).device).manual_seed(OWN_SEED)
    trained = trained_weights(model)
    with torch.inference_mode(False), torch.enable_grad(), untouched(model, objective.teacher):
        return _step(Batch(objective, model, clean, cond or {}, generator), trained)


def _step(batch: Batch, trained: list[nn.Parameter]) -> Report:
    student = Student(batch, trained)
    graph = student.predict()
    predicted = map_leaves(Tensor.detach, graph)
    with Watch(batch.objective.teacher) as watch:
        teacher = TeacherStep(batch, predicted, trained, watch)
        features, losses, cotangent = teacher.features(), teacher.losses(), teacher.gradient()
        gradients = student.gradients(graph, cotangent, watch)
        del graph
        teacher.check_slope(cotangent, losses)
        held = getattr(batch.objective.teacher, "parameters_held", None)
        held = sum(p.numel() for p in watch.parameters) if held is None else held
    mse, size = mean(teacher.error), mean(teacher.target)
    skill = knowledge.judge(batch, predicted, above_zero=mse < size)
    student.check_input(predicted, cotangent, gradients)
    return Report(
        loss=float(losses.mean()),
        mse=mse,
        explained=1 - mse / max(size, TINY),
        skill=skill,
        teacher_parameters=held,
        trained_parameters=sum(p.numel() for p, g in zip(trained, gradients, strict=True) if g is not None),
        features=tuple(features),
        warnings=tuple(batch.warnings),
    )
