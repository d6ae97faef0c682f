"""`perceptual-diffusion inspect`: what a model is made of, what the objective would compare in it, and what a step costs."""

import contextlib
import copy
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from perceptual_diffusion import SelfPerceptualObjective, adapters, taps
from perceptual_diffusion._shapes import check_sample, first, map_leaves
from perceptual_diffusion.adapters import Adapter
from perceptual_diffusion.cli import loading
from perceptual_diffusion.cli._errors import UserError
from perceptual_diffusion.inspection import Block, StepCost, example, probe_layers, step_cost, trace
from perceptual_diffusion.objective import call_model
from perceptual_diffusion.schedules import Linear, Schedule
from perceptual_diffusion.types import ModelCall

WEAK = "The clean sample is normal noise: sensitivities and gradients on real data will differ. Give data with module:callable."
PROBE_BATCH, LARGEST_BATCH = 8, 65536
LARGEST = 3e9
"""Parameters of a model that is made only to be traced."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for."""

    target: str
    layers: tuple[str, ...] = ()
    size: str | None = None
    batch: int | None = None
    inputs: str | None = None
    prediction: str | None = None
    probe: bool = False
    plot: Path | None = None


def run(settings: Settings, *, as_json: bool) -> None:
    """Inspect a model and print what was found.

    Args:
        settings: what was asked for.
        as_json: print JSON instead of tables.

    Raises:
        UserError: something that the user can mend.
    """
    if settings.plot is not None and not settings.probe:
        raise UserError("--plot draws the probe. Give --probe as well.")
    if settings.batch is not None and not 1 <= settings.batch <= LARGEST_BATCH:
        raise UserError(f"--batch is {settings.batch}, expected at least 1 and at most {LARGEST_BATCH}.")
    _size(settings.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model and of its libraries
        facts = report(settings)
    if as_json:
        print(json.dumps(facts, indent=1, allow_nan=False))
    else:
        from perceptual_diffusion.cli.tables import show

        show(facts)


def report(settings: Settings) -> dict[str, Any]:
    """Gather what `inspect` says of a model, as it is printed with --json."""
    target = loading.load(settings.target)
    model, mode = _build(target)
    clean, cond, made = _inputs(settings, target, model)
    with _silent():
        objective, adapter, said = _facts(settings, target, model)
    if adapter is None and target.from_config:  # a class that is refused
        raise UserError(said["middle"]["error"])
    layers = settings.layers or (adapter.layers if adapter is not None else ())
    try:
        for name in layers:
            taps.layer(taps.unwrap(model), name)
    except ValueError as error:
        raise UserError(str(error)) from error
    with _silent():
        call, t = _calling(objective, adapter, model, first(clean))
    x_t = map_leaves(lambda x: x.detach().clone(), clean)
    blocks, cost, faked = _measure(target, _Pass(call=call, x_t=x_t, t=t, cond=cond), layers, model, mode)
    facts: dict[str, Any] = {
        "target": settings.target,
        "class": type(taps.unwrap(model)).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        **said,
        "layers": list(layers),
        "sample": {"clean": _shapes(clean), "cond": _shapes(cond), "made up": made, "on fake tensors": faked},
        "blocks": [asdict(block) for block in blocks],
        "cost": None if cost is None else {**asdict(cost), "ratio": cost.ratio},
    }
    if settings.probe:
        facts["probe"] = _probe(settings, target, clean, cond, made)
    return facts


def _build(target: loading.Target) -> tuple[nn.Module, FakeTensorMode | None]:
    """Build the model on fake tensors, which take no memory, or where it refuses, as it is."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _silent(), contextlib.suppress(Exception):
        if not target.from_config:
            return _imagine(target.make(False), mode), mode
        with mode:
            return target.make(False), mode
    with _silent():
        return target.make(False), None


def _inputs(settings: Settings, target: loading.Target, model: nn.Module) -> tuple[Any, dict[str, Any], bool]:
    """The clean sample, the condition, and whether they are made up."""
    given = target.inputs
    if settings.inputs is not None:
        given = loading.call(settings.inputs)
        if not isinstance(given, tuple) or len(given) != 2:
            raise UserError(f"{settings.inputs!r} gives a {type(given).__name__}, expected (clean, cond).")
    if given is not None:
        try:
            check_sample("clean", given[0])
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        if settings.size is not None or settings.batch is not None:
            raise UserError("--size and --batch are for made-up inputs, and here they are given. Leave them out.")
        if not isinstance(given[1], Mapping | None):
            raise UserError(
                f"`cond` is a {type(given[1]).__name__}, expected a mapping of the model's keyword arguments."
            )
        return given[0], dict(given[1] or {}), False
    batch = settings.batch or (PROBE_BATCH if settings.probe else 1)
    try:
        clean, cond = example(model, batch, size=_size(settings.size))
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:  # the last two: more than the memory holds
        raise UserError(f"{str(error).removesuffix('Make the inputs yourself.')}{_MEND}") from error
    return clean, cond, True


_MEND = "Pass `--inputs module:callable`, a function that gives (clean, cond)."


def _size(text: str | None) -> int | tuple[int, ...] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,5}(x\d{1,5}){0,2}", text) or "0" in text.split("x"):
        raise UserError(f"--size is {text!r}, expected 64, 64x96 (height x width) or 8x64x96 (frames first).")
    numbers = tuple(int(number) for number in text.split("x"))
    return numbers[0] if len(numbers) == 1 else numbers


def _facts(
    settings: Settings, target: loading.Target, model: nn.Module
) -> tuple[SelfPerceptualObjective | None, Adapter | None, dict[str, Any]]:
    """What the adapter and the scheduler say, each or why it does not; the objective if both do."""
    adapter, objective = None, None
    middle: dict[str, Any] = {"layers": [], "why": None, "sure": False, "error": None}
    process: dict[str, Any] = {"scheduler": None, "schedule": None, "prediction": settings.prediction, "error": None}
    try:
        adapter = adapters.find(model)
        middle |= {"layers": list(adapter.layers), "why": adapter.why, "sure": adapter.sure}
    except (TypeError, ValueError) as error:
        middle["error"] = str(error)
    given = target.scheduler
    if given is not None:
        process["scheduler"] = None if isinstance(given, Schedule) else type(given).__name__
        try:
            objective = _objective(model, given, adapter, settings.prediction)
            process |= {"schedule": repr(objective.schedule), "prediction": objective.prediction.name}
        except (TypeError, ValueError) as error:
            process["error"] = str(error)
    family = None if adapter is None else adapter.family
    return objective, adapter, {"family": family, "middle": middle, "process": process}


def _objective(model: nn.Module, schedule: Any, adapter: Adapter | None, prediction: Any) -> SelfPerceptualObjective:
    """The objective without a teacher: it knows how to call the model."""
    layers = None if adapter is not None else ["none"]
    return SelfPerceptualObjective.wrap(
        model, schedule, prediction=prediction, layers=layers, teacher=lambda x_t, t, cond: []
    )


def _calling(
    objective: SelfPerceptualObjective | None, adapter: Adapter | None, model: nn.Module, like: Tensor
) -> tuple[ModelCall, Tensor]:
    """How the model is called, and times half-way through the schedule; where that is unknown, through a straight path."""
    if objective is None:
        try:
            objective = _objective(model, Linear(), adapter, "flow_prediction")
        except (TypeError, ValueError):
            return call_model, like.new_full((len(like),), 0.5)
    t = objective.schedule.at(torch.full((len(like),), 0.5, dtype=torch.float64)).to(like.device)
    return objective.call, t if objective.schedule.discrete else t.float()


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """One pass of a model: what it is given, and how."""

    call: ModelCall
    x_t: Any
    t: Tensor
    cond: dict[str, Any]

    def measure(self, model: nn.Module, layers: tuple[str, ...]) -> tuple[list[Block], StepCost | None]:
        """Trace the blocks, and count a step if the layers are known."""

        def run() -> Any:
            return self.call(model, self.x_t, self.t, self.cond)

        blocks = trace(model, run, sample=self.x_t)
        return blocks, step_cost(model, run, layers, sample=self.x_t) if layers else None


def _measure(
    target: loading.Target, given: _Pass, layers: tuple[str, ...], model: nn.Module, mode: FakeTensorMode | None
) -> tuple[list[Block], StepCost | None, bool]:
    """Measure on fake tensors; where the model looks at values, run it. The last is whether it was fake."""
    held = sum(p.numel() for p in model.parameters())
    if mode is not None:
        try:
            with _silent(), mode:
                return *given.measure(model, layers), True
        except Exception as error:
            if target.from_config and held > LARGEST:
                raise UserError(
                    f"{type(model).__name__} cannot be traced on fake tensors ({type(error).__name__}: {_first_line(error)}), and "
                    f"with {held / 1e9:.1f} G parameters it is too large to be made for that. Give a smaller config of its class."
                ) from error
    try:
        return *given.measure(target.make(False), layers), False
    except UserError:
        raise
    except Exception as error:  # the model's own
        raise UserError(
            f"{type(taps.unwrap(model)).__name__} cannot be run with these inputs: {type(error).__name__}: "
            f"{_first_line(error)}{'' if target.inputs else ' ' + _MEND}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _imagine(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Copy a model onto fake tensors: its values are neither copied nor changed."""
    memo: dict[int, Any] = {id(tensor): mode.from_tensor(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what fake tensors and diffusers log of what they cannot do off the screen."""
    names = ("torch._subclasses.fake_tensor", "diffusers", "perceptual_diffusion")
    before = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    try:
        for logger, _ in before:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)


def _probe(settings: Settings, target: loading.Target, clean: Any, cond: dict[str, Any], made: bool) -> dict[str, Any]:
    if target.scheduler is None:
        raise UserError(
            "--probe needs a schedule. Give a folder with its scheduler, or a function that gives (model, clean, cond, scheduler)."
        )
    try:
        probe = probe_layers(
            target.make(True),
            clean,
            schedule=target.scheduler,
            prediction=settings.prediction,
            cond=cond,
            layers=settings.layers or None,
        )
        if settings.plot is not None:
            probe.plot(settings.plot)
    except (TypeError, ValueError, RuntimeError, OSError, ModuleNotFoundError) as error:
        raise UserError(f"the layers cannot be probed: {error}") from error
    found: dict[str, Any] = json.loads(probe.to_json())
    return {**found, "table": probe.table(), "note": WEAK if made else None}


def _shapes(value: Any) -> Any:
    """Shapes in place of tensors, and only numbers and words beside them."""
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, dict):
        return {str(key): _shapes(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shapes(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__
