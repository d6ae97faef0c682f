"""Put an objective together: adapter of the model, process of the scheduler, teacher."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perceptual_diffusion import objective, taps
from perceptual_diffusion._shapes import check_sample, first, map_scaled, over
from perceptual_diffusion.adapters import edm
from perceptual_diffusion.adapters._explained import Explained
from perceptual_diffusion.adapters._heard import Heard
from perceptual_diffusion.adapters._registry import Adapter, find, is_known, known, without_variance
from perceptual_diffusion.adapters._trace import after_layers
from perceptual_diffusion.adapters._tree import check_called
from perceptual_diffusion.adapters.schedulers import ModelInput, Process, read
from perceptual_diffusion.copies import same_storage
from perceptual_diffusion.lora import LoraTeacher
from perceptual_diffusion.schedules import EDM, Interpolant, Linear, Schedule
from perceptual_diffusion.teachers import CopyTeacher, ModuleTeacher
from perceptual_diffusion.types import Cond, ModelCall

logger = logging.getLogger("perceptual_diffusion")

FLOWS = ("flow_prediction", "-flow_prediction")


def assemble(
    model: Any,
    schedule: Any,
    *,
    prediction: Any,
    layers: Any,
    call: Any,
    output: Any,
    teacher: Any,
    t: Any,
    features: Any,
    **how: Any,
) -> dict[str, Any]:
    """Turn the arguments of `SelfPerceptualObjective.wrap` into those of its constructor."""
    model, schedule = _from_pipeline(model, schedule)
    if not isinstance(model, nn.Module):
        find(model)  # raises, saying what to pass
    process = Process(schedule=schedule, prediction=None) if isinstance(schedule, Schedule) else read(schedule)
    names = _names(layers)
    adapter = known(model)
    outside = callable(teacher) and not isinstance(teacher, nn.Module)
    if adapter is None:  # with layers given by hand, it is called as `model(x_t, t, **cond)`, or by `call`
        fields = edm.conventions(model) or {"family": "explicit", "output": without_variance}
        adapter = Adapter(layers=names, **fields) if names or outside else find(model)
    if not names and not outside:
        log = logger.info if adapter.sure else logger.warning
        log("%s: comparing the features of %s (%s)", type(model).__name__, ", ".join(adapter.layers), adapter.why)
    if not outside:
        check_called(teacher if isinstance(teacher, nn.Module) else model, names)
    by_family = call is None and edm.conventions(model) is None
    student_call = Explained(_family_call(adapter, process) if call is None else call, classes=by_family)
    options = {
        "layers": names or adapter.layers,
        "call": student_call,
        "select": adapter.select,
        "features": features,
        "prepare": adapter.prepare,
    }
    return {
        "schedule": process.schedule,
        "prediction": _prediction(adapter, process) if prediction is None else prediction,
        "call": Heard(student_call),
        "output": output or adapter.output,
        "t": process.t if t is None else t,
        "teacher": _teacher(model, teacher, process.schedule, options, how | {"own_call": call is not None}),
    }


def denoiser(pipeline: Any) -> nn.Module:
    """Give the one denoiser among the components of a diffusers pipeline.

    Raises:
        ValueError: there is none, or more than one; the message names them.
    """
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    found = [name for name, part in models.items() if part is not None and is_known(part)]
    if len(found) == 1:
        return models[found[0]]
    if not found:
        raise ValueError(
            f"{type(pipeline).__name__} has no known denoiser among {', '.join(map(str, models)) or 'its components'}. Pass the model "
            "itself, and `pipeline.scheduler`."
        )
    raise ValueError(
        f"{type(pipeline).__name__} has {len(found)} denoisers: {', '.join(map(str, found))}. Pass one of "
        f"{', '.join(f'`pipeline.{name}`' for name in found)} and `pipeline.scheduler`."
    )


def _from_pipeline(model: Any, schedule: Any) -> tuple[Any, Any]:
    """The denoiser and the scheduler, where a pipeline is given."""
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "components", None), Mapping):
        schedule = model.components.get("scheduler") if schedule is None else schedule
        model = denoiser(model)
    if schedule is None:
        raise ValueError(
            "`schedule` is missing. Pass a diffusers scheduler, such as `pipeline.scheduler`, or one of perceptual_diffusion.schedules."
        )
    return model, schedule


def _prediction(adapter: Adapter, process: Process) -> Any:
    """What the model predicts: the scheduler says it, or on a flow the family, which knows the sign."""
    says = None if adapter.time == "sigma" else process.prediction
    if adapter.prediction is None or not (says is None or says in FLOWS):
        if says is None:
            raise ValueError(
                "`prediction` is missing, and the schedule does not say it. Pass `prediction='v_prediction'` or what the model predicts."
            )
        return says
    if isinstance(adapter.prediction, tuple):
        kinds = " or ".join(f"`prediction={kind!r}`" for kind in adapter.prediction)
        raise ValueError(f"released models of the family {adapter.family} differ in what they predict. Pass {kinds}.")
    if (
        adapter.prediction in FLOWS
        and isinstance(process.schedule, Interpolant)
        and not _runs_to_noise(process.schedule)
    ):
        raise ValueError(
            f"`prediction` is missing: models of the family {adapter.family} predict a velocity, which on {process.schedule!r} is the derivative "
            "in its own t, with another sign or size than theirs. Pass `prediction='flow_prediction'` for that derivative, "
            "'-flow_prediction' for its negative, or `schedules.Linear`."
        )
    return adapter.prediction


def _runs_to_noise(schedule: Interpolant) -> bool:
    """Whether its derivative has the sign and the size of the path from t = 0 (clean) to 1."""
    return not schedule.noise_first and schedule.high - schedule.low == 1


def _names(layers: Any) -> tuple[str, ...]:
    if layers is None:
        return ()
    names = (layers,) if isinstance(layers, str) else tuple(layers) if isinstance(layers, list | tuple) else None
    if not names or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"`layers` is {layers!r}, expected a dotted name or a list of them, such as ['mid_block'].")
    return names


def _family_call(adapter: Adapter, process: Process) -> ModelCall:
    """The family's call, given x_t and t as the schedule has them."""
    if adapter.time == "sigma":  # D(x, sigma) scales its input and its time itself
        return _Scaled(adapter.call, _Unscaled(process.schedule))
    if process.model_input is not None:
        return _Scaled(adapter.call, process.model_input)
    if adapter.time == "schedule":
        return adapter.call
    if isinstance(process.schedule, EDM):
        raise ValueError(
            f"`call` is missing: models of the family {adapter.family} take a time as {adapter.time!r}, and {process.schedule!r} "
            "does not say how sigma becomes that. Pass `call=lambda model, x_t, t, cond: model(...)`."
        )
    return _Scaled(adapter.call, _ModelTime(process.schedule, adapter.time))


@dataclass(frozen=True)
class _ModelTime:
    """The time of the schedule in the model's unit."""

    schedule: Schedule
    unit: str

    def __call__(self, x_t: Any, t: Tensor) -> tuple[Any, Tensor]:
        if self.unit == "timestep" and self.schedule.discrete:
            return x_t, t.float()
        linear = isinstance(self.schedule, Linear)
        level = self.schedule(t)[1] if linear else self.schedule.level(t)  # a flow's time is sigma, whatever the shift
        if self.unit.startswith("reversed"):
            level = 1 - level
        return x_t, (level * 1000 if self.unit.endswith("timestep") else level).float()


@dataclass(frozen=True)
class _Unscaled:
    """clean + sigma noise and sigma, of a sample on any schedule: x_t / alpha and sigma / alpha."""

    schedule: Schedule

    def __call__(self, x_t: Any, t: Tensor) -> tuple[Any, Tensor]:
        if isinstance(self.schedule, EDM):
            return x_t, t.float()
        alpha, sigma = self.schedule(t)
        return map_scaled(lambda k, x: x / over(k[0], x), (alpha,), x_t), (sigma / alpha).float()


@dataclass(frozen=True)
class _Scaled:
    """A call that is given the sample and the time as the schedule has them."""

    call: ModelCall
    model_input: ModelInput

    def __call__(self, model: Any, x_t: Any, t: Tensor, cond: Cond, /) -> Any:
        return self.call(model, *self.model_input(x_t, t), cond)


def _teacher(
    model: nn.Module, teacher: Any, schedule: Schedule, options: Mapping[str, Any], how: Mapping[str, Any]
) -> Any:
    """The teacher of a name, or of a module; anything else is one already."""
    kind = teacher if isinstance(teacher, str) else "a module" if isinstance(teacher, nn.Module) else "a callable"
    if kind not in ("copy", "lora", "a module", "a callable"):
        raise ValueError(
            f"unknown teacher {teacher!r}, expected 'copy', 'lora', a torch.nn.Module, or a callable `(x_t, t, cond) -> features`."
        )
    _check_options(kind, how)
    if kind == "copy":
        example, found = _example(how["example"], schedule), None
        if how["truncate"] and example is None and not how["own_call"]:  # a call of the user's is run on data only
            found = after_layers(model, options["call"], schedule, options["layers"])
        return CopyTeacher(
            model,
            **options,
            compile=how["compile"],
            truncate=how["truncate"],
            dtype=how["teacher_dtype"],
            example=example,
            without=found or (),
        )
    if kind == "lora":
        return LoraTeacher(model, **options, compile=how["compile"])
    if kind == "a callable":
        return teacher
    inner = taps.unwrap(teacher)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in teacher.modules()):
        inner = teacher  # it gathers its weights itself
    if same_storage(taps.unwrap(model), inner):
        raise ValueError(
            "`teacher` shares its weights with `model`, so it would move with it. Pass 'copy', or a module of its own; of a model "
            "with LoRA, 'lora'."
        )
    return ModuleTeacher(inner, **options, compile=how["compile"])


MEANT_FOR = {
    "teacher_dtype": ("copy",),
    "example": ("copy",),
    "compile": ("copy", "lora", "a module"),
}
"""The kinds of teacher that an argument is for."""


def _check_options(kind: str, how: Mapping[str, Any]) -> None:
    for name, kinds in MEANT_FOR.items():
        if not (how[name] is None or how[name] is False) and kind not in kinds:
            raise ValueError(
                f"`{name}` is given, but the teacher is {kind if kind.startswith('a ') else repr(kind)}. It is for "
                f"{', '.join(k if k.startswith('a ') else repr(k) for k in kinds)} only; leave it out."
            )


def _example(example: Any, schedule: Schedule) -> tuple[Any, Tensor, Cond] | None:
    """An input of the teacher, of a clean sample and its condition."""
    if example is None:
        return None
    if not isinstance(example, tuple | list) or len(example) != 2 or not isinstance(example[1], Mapping | None):
        raise TypeError(
            "`example` is not a pair. Pass a batch as it is given to the objective: `(clean, cond)`, `cond` a mapping or None."
        )
    clean, cond = example
    check_sample("example[0]", clean)
    like = first(clean)
    t = schedule.at(torch.full((len(like),), 0.5, dtype=torch.float64)).to(like.device)
    return clean, t if schedule.discrete else t.float(), cond or {}


objective.install(assemble)
