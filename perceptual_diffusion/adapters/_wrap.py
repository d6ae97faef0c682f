"""Put an objective together: adapter of the model, process of the scheduler, teacher."""

from typing import Any

import torch
from torch import Tensor, nn

from perceptual_diffusion import objective, taps
from perceptual_diffusion.adapters._registry import Adapter, find, known
from perceptual_diffusion.adapters.schedulers import ModelInput, Process, read
from perceptual_diffusion.schedules import EDM, Schedule
from perceptual_diffusion.teachers import CopyTeacher, ModuleTeacher, same_storage
from perceptual_diffusion.types import Cond, ModelCall


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
    truncate: bool,
) -> dict[str, Any]:
    """Turn the arguments of `SelfPerceptualObjective.wrap` into those of its constructor."""
    if not isinstance(model, nn.Module):
        find(model)  # raises, saying what to pass
    process = Process(schedule=schedule, prediction=None) if isinstance(schedule, Schedule) else read(schedule)
    if prediction is None:
        prediction = process.prediction
    if prediction is None:
        raise ValueError(
            "`prediction` is missing, and the schedule does not say it. Pass `prediction='v_prediction'` or what the model predicts."
        )
    names = _names(layers)
    adapter = known(model)
    if adapter is None:  # with layers given by hand, it is called as `model(x_t, t, **cond)`, or by `call`
        adapter = Adapter(family="explicit", layers=names) if names else find(model)
    student_call = call or _family_call(adapter, process)
    names = names or adapter.layers
    return {
        "schedule": process.schedule,
        "prediction": prediction,
        "call": student_call,
        "output": output or adapter.output,
        "t": process.t if t is None else t,
        "teacher": _teacher(model, teacher, names, student_call, adapter, truncate),
    }


def _names(layers: Any) -> tuple[str, ...]:
    if layers is None:
        return ()
    names = (layers,) if isinstance(layers, str) else tuple(layers) if isinstance(layers, list | tuple) else None
    if not names or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"`layers` is {layers!r}, expected a dotted name or a list of them, such as ['mid_block'].")
    return names


def _family_call(adapter: Adapter, process: Process) -> ModelCall:
    """The family's call, given x_t and t as the schedule has them."""
    if process.model_input is not None:
        return _scaled(adapter.call, process.model_input)
    schedule = process.schedule
    if adapter.time_scale is None or schedule.discrete or schedule.high == adapter.time_scale:
        return adapter.call
    ends = torch.tensor([schedule.low, schedule.high])
    _, sigma = schedule(ends)
    if isinstance(schedule, EDM) or not bool(sigma[0] < sigma[1]):
        raise ValueError(
            f"`call` is missing: models of the family {adapter.family} take a time from 0 (clean) to {adapter.time_scale:g}, and "
            f"{schedule!r} does not say how its time becomes that. Pass `call=lambda model, x_t, t, cond: model(...)`."
        )
    factor = adapter.time_scale / schedule.high
    return _scaled(adapter.call, lambda x_t, t: (x_t, t * factor))


def _scaled(call: ModelCall, model_input: ModelInput) -> ModelCall:
    def scaled(model: Any, x_t: Any, t: Tensor, cond: Cond, /) -> Any:
        return call(model, *model_input(x_t, t), cond)

    return scaled


def _teacher(
    model: nn.Module, teacher: Any, names: tuple[str, ...], call: ModelCall, adapter: Adapter, truncate: bool
) -> Any:
    if isinstance(teacher, str):
        if teacher != "copy":
            raise ValueError(
                f"unknown teacher {teacher!r}, expected 'copy', a torch.nn.Module, or a callable `(x_t, t, cond) -> features`."
            )
        return CopyTeacher(model, layers=names, call=call, select=adapter.select, truncate=truncate)
    if not isinstance(teacher, nn.Module):
        return teacher
    inner = taps.unwrap(teacher)
    if same_storage(taps.unwrap(model), inner):
        raise ValueError(
            "`teacher` shares its weights with `model`, so it would move with it. Pass 'copy', or a module of its own."
        )
    return ModuleTeacher(inner, layers=names, call=call, select=adapter.select)


objective.install(assemble)
