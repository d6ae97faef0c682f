"""The table of model families."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from perceptual_diffusion import taps
from perceptual_diffusion.objective import call_model, take_prediction
from perceptual_diffusion.types import FeatureSelect, ModelCall, ModelOutput

GROUP = "perceptual_diffusion.adapters"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What the objective must know of a model family.

    Attributes:
        family: what reports call it.
        layers: dotted names of the model's middle.
        call: `(model, x_t, t, cond) -> output`.
        output: `(output, x_t) -> prediction`.
        select: takes the noisy sample's stream out of a layer's output.
        time_scale: the time that the model is given for pure noise, where 0 is clean: a continuous schedule's time is
            scaled to it. None: the model takes the schedule's own time.
    """

    family: str
    layers: tuple[str, ...]
    call: ModelCall = call_model
    output: ModelOutput = take_prediction
    select: FeatureSelect = taps.select
    time_scale: float | None = None


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
    """Give the adapter of a model, also inside DDP or torch.compile.

    Args:
        model: an instance of a known class or of a subclass of one.

    Returns:
        the adapter; its `layers` name the model's middle.

    Raises:
        TypeError: it is no `torch.nn.Module`.
        ValueError: its class is unknown; the message names what to pass by hand.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` is {_article(type(model).__name__)}, expected a torch.nn.Module. Pass `pipeline.unet` or `pipeline.transformer`."
        )
    model = taps.unwrap(model)
    adapter = known(model)
    if adapter is None:
        names = ", ".join(n for n, _ in model.named_children()) or "none"
        raise ValueError(
            f"no adapter for {type(model).__name__}. Pass `layers=[...]`, the dotted name of its middle (at its top level: {names}), "
            "and `call=` if it is not called as `model(x_t, t, **cond)`; or use `adapters.register`."
        )
    return adapter


def known(model: nn.Module) -> Adapter | None:
    """Give the adapter of a model, or None where its class is unknown."""
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
    return None


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
