"""A model's call whose failures say what the model was given: torch's own errors name no argument."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from perceptual_diffusion import taps
from perceptual_diffusion._shapes import batch_size, describe, first, tensors_in
from perceptual_diffusion.types import Cond, ModelCall

FAILURES = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError)
"""What a model raises that is given the wrong thing."""


class PassError(ValueError, RuntimeError):
    """A model cannot be run on what it is given.

    Also a RuntimeError, as torch's own are, for those who wait for one: autocast tried anew, a smaller batch size found.
    """


class UnsupportedError(PassError, NotImplementedError):
    """The same, where torch has no kernel for it."""


@dataclass(frozen=True)
class Explained:
    """A call that raises a `PassError` or a TypeError with the shapes of all arguments where the model fails.

    Running out of memory, what compilers and devices raise, exceptions of the model's own classes, and errors of this package
    stay as they are.

    Attributes:
        call: `(model, x_t, t, cond) -> output`.
        classes: whether `cond["class_labels"]` is one class for each sample, as diffusers' denoisers take it.
    """

    call: ModelCall
    classes: bool = False

    def __post_init__(self) -> None:
        if not callable(self.call):
            raise TypeError(f"`call` is {self.call!r}, expected a callable.")

    def __call__(self, model: Any, x_t: Any, t: Tensor, cond: Cond, /) -> Any:
        if not callable(model):
            raise TypeError(f"`model` is {model!r}, expected the student, a torch.nn.Module.")
        # from weights or indices without values torch's convolutions and embeddings give numbers all the same
        if isinstance(model, nn.Module) and _is_empty(model):
            raise ValueError(
                f"`model` is a {type(model).__name__} on the meta device, without values. Load its weights."
            )
        if any(x.device.type == "meta" for x in tensors_in(cond)) and first(x_t).device.type != "meta":
            raise ValueError(
                f"`cond` {describe(dict(cond))} has a tensor on the meta device, without values. Pass all with values."
            )
        if self.classes:
            _check_labels(cond, x_t)
        try:
            return self.call(model, x_t, t, cond)
        except FAILURES as error:
            if _stays(error):
                raise
            if isinstance(error, TypeError):
                raise TypeError(_told(error, model, x_t, t, cond)) from error
            if isinstance(error, NotImplementedError):
                raise UnsupportedError(_told(error, model, x_t, t, cond)) from error
            raise PassError(_told(error, model, x_t, t, cond)) from error


def _check_labels(cond: Cond, x_t: Any) -> None:
    """Refuse several classes of a lone sample: it is broadcast to them, and layers before a skip do not notice."""
    labels = cond.get("class_labels")
    if isinstance(labels, Tensor) and labels.ndim == 1 and len(labels) > 1 and batch_size(x_t) == 1:
        raise ValueError(
            f"`cond` has {len(labels)} labels in 'class_labels' for a sample of shape {describe(x_t)}. Pass one for each."
        )


def _told(error: Exception, model: Any, x_t: Any, t: Tensor, cond: Cond) -> str:
    """What failed, and all that the model was given."""
    name = type(taps.unwrap(model)).__name__ if isinstance(model, nn.Module) else "`model`"
    return (
        f"{name} cannot be run on a sample of shape {describe(x_t)} and {first(x_t).dtype}, times of shape {describe(t)} "
        f"and `cond` {describe(dict(cond))}: {type(error).__name__}: {str(error).rstrip('.')}. Give it what it takes, or "
        "say with `call=` how it is called."
    )


def _is_empty(model: nn.Module) -> bool:
    """Whether the weights have no values, and no hook will bring them."""
    held = next(model.parameters(), None)
    if held is None or held.device.type != "meta":
        return False
    return not any("_hf_hook" in vars(module) or "_diffusers_hook" in vars(module) for module in model.modules())


def _stays(error: Exception) -> bool:
    if type(error).__module__ != "builtins" or "can't allocate memory" in str(error):  # how a CPU runs out of it
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    ours = trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("perceptual_diffusion.")
    return ours and isinstance(error, ValueError)
