"""The table of model families."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn

from perceptual_diffusion import taps
from perceptual_diffusion.objective import call_model, take_prediction
from perceptual_diffusion.types import FeatureSelect, ModelCall, ModelOutput, Sample

GROUP = "perceptual_diffusion.adapters"


TIMES = ("schedule", "timestep", "unit", "reversed timestep", "reversed unit", "sigma")
"""Units of a model's time: the schedule's own; 0 clean to 1000 noise (the index of a table); 0 to 1; 1000 to 0; 1 to 0; the
noise of a sample clean + sigma noise, which the model is given."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What the objective must know of a model family.

    Attributes:
        family: what reports call it.
        layers: dotted names of the model's middle.
        call: `(model, x_t, t, cond) -> output`, t in the model's unit of time, shape (B,).
        output: `(output, x_t) -> prediction`.
        select: takes one tensor, batch first, out of a layer's output; None: the noisy sample's part is found.
        prepare: mends in place what `eval()` breaks in a teacher of the family.
        time: the unit of the model's time, one of `TIMES`.
        prediction: what released models of the family predict on a flow-matching scheduler or where no scheduler says it;
            several where they differ; None: only the scheduler says it.
        why: how the middle was found.
        sure: whether it is known, or found by a clear rule, rather than a guess.
    """

    family: str
    layers: tuple[str, ...]
    call: ModelCall = call_model
    output: ModelOutput = take_prediction
    select: FeatureSelect | None = None
    prepare: Callable[[nn.Module], None] | None = None
    time: str = "schedule"
    prediction: str | tuple[str, ...] | None = None
    why: str = "declared"
    sure: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.time, str) or self.time not in TIMES:
            raise ValueError(f"`time` is {self.time!r}, expected one of {', '.join(map(repr, TIMES))}.")


Factory = Callable[[Any], Adapter]

_factories: dict[str, Factory] = {}
_loaded_entry_points = False


def register(cls: str | type, factory: Factory) -> None:
    """Tell how to adapt a class of models.

    Args:
        cls: the class, or "package.ClassName" where it should not be imported (only the top-level package counts).
        factory: `(model) -> Adapter`.

    Raises:
        TypeError: `cls` is neither, or `factory` is not callable.
    """
    if not isinstance(cls, str | type):
        raise TypeError(f"`cls` is {cls!r}, expected a class or 'package.ClassName'.")
    if isinstance(cls, str) and ("." not in cls or not all(part.isidentifier() for part in cls.split("."))):
        raise ValueError(f"`cls` is {cls!r}, expected 'package.ClassName', such as 'diffusers.UNet2DModel'.")
    if not callable(factory):
        raise TypeError(f"`factory` is {factory!r}, expected a function `(model) -> Adapter`.")
    _factories[_key(cls) if isinstance(cls, type) else f"{cls.split('.')[0]}.{cls.split('.')[-1]}"] = factory


def find(model: Any) -> Adapter:
    """Give the adapter of a model, also inside DDP, FSDP, PEFT or torch.compile.

    Args:
        model: a model of a known class, or any other whose middle the general rule finds.

    Returns:
        the adapter; its `layers` name the model's middle, `why` and `sure` say how they were found.

    Raises:
        TypeError: it is no `torch.nn.Module`.
        ValueError: its class cannot be used, or is unknown and has no clear middle; the message says what to pass.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` is {_article(type(model).__name__)}, expected a torch.nn.Module. Pass `pipeline.unet` or `pipeline.transformer`."
        )
    adapter = known(model)
    if adapter is not None:
        return adapter
    from perceptual_diffusion.adapters import edm, general

    found = general.middle(model)
    fields = edm.conventions(model) or {"family": "general", "output": without_variance}
    return Adapter(layers=found.layers, why=found.why, sure=found.confidence == "high", **fields)


def without_variance(output: Any, x_t: Sample) -> Sample:
    """Take the prediction out of an output: of exactly twice the sample's channels the first half, the rest is a variance.

    The channels are dim 1 of vectors and maps and the last of tokens (B, N, C) (Nichol & Dhariwal 2021; Peebles & Xie 2022).
    """
    prediction = take_prediction(output, x_t)
    if isinstance(prediction, Tensor) and isinstance(x_t, Tensor) and x_t.ndim > 1:
        dim = 2 if x_t.ndim == 3 else 1
        doubled = [size * (1 + (place == dim)) for place, size in enumerate(x_t.shape)]
        if list(prediction.shape) == doubled:
            return prediction.narrow(dim, 0, x_t.shape[dim])
    return prediction


def known(model: nn.Module) -> Adapter | None:
    """Give the adapter of a model, or None where its class is unknown."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"`model` is a {type(model).__name__}, a compiled program without layers to tap. Pass the torch.nn.Module that it was made of."
        )
    _load_entry_points()
    for cls in type(taps.unwrap(model)).__mro__:
        factory = _factories.get(_key(cls))
        if factory is not None:
            adapter = factory(taps.unwrap(model))
            if not isinstance(adapter, Adapter):
                raise TypeError(
                    f"the factory of {cls.__name__} gives {type(adapter).__name__}, expected an adapters.Adapter. "
                    "Return one from the function passed to `adapters.register`."
                )
            return adapter
    return _sit(taps.unwrap(model))


def _sit(model: nn.Module) -> Adapter | None:
    """Give the adapter of a SiT: its own has the data at t = 1 and predicts clean − noise, REPA's the other way round."""
    blocks = model._modules.get("blocks")
    if type(model).__name__ != "SiT" or not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return None
    return Adapter(
        family="SiT",
        layers=(f"blocks.{len(blocks) // 2}",),
        output=without_variance,
        prediction=("-flow_prediction", "flow_prediction"),
    )


def is_known(model: nn.Module) -> bool:
    """Whether the class of a model, or one that it derives from, is registered."""
    _load_entry_points()
    return any(_key(cls) in _factories for cls in type(taps.unwrap(model)).__mro__)


def _key(cls: type) -> str:
    return f"{cls.__module__.split('.')[0]}.{cls.__name__}"


def _article(word: str) -> str:
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def _load_entry_points() -> None:
    global _loaded_entry_points
    if _loaded_entry_points:
        return
    for entry in entry_points(group=GROUP):
        try:
            entry.load()()
        except Exception as error:  # of another package
            raise ValueError(
                f"the adapters of {entry.value!r} (entry point {entry.name!r}) cannot be loaded: {error}. Update or uninstall that package."
            ) from error
    _loaded_entry_points = True
