"""A student's call, listened to for a gradient that torch drops with a warning only."""

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from perceptual_diffusion.types import Cond, ModelCall

LOST = "None of the inputs have requires_grad"
"""How torch says that a reentrant checkpoint has no gradient to hand on; what is trained inside gets none."""

_one = threading.Lock()
"""Filters of warnings are the whole process': one thread listens at a time."""


class Heard:
    """A call of the student, listened to until one with gradient has been well.

    Of a reentrant checkpoint whose inputs have no gradient, torch drops the gradient of the weights inside with a warning.

    Args:
        call: `(model, x_t, t, cond) -> output`.
    """

    def __init__(self, call: ModelCall) -> None:
        self.call, self._well = call, False

    def __call__(self, model: Any, x_t: Any, t: Tensor, cond: Cond, /) -> Any:
        trains = torch.is_grad_enabled() and isinstance(model, nn.Module)
        if self._well or not trains or not any(p.requires_grad for p in model.parameters()):
            return self.call(model, x_t, t, cond)
        if not _one.acquire(blocking=False):  # the next call listens
            return self.call(model, x_t, t, cond)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("always", LOST, UserWarning)
                warnings.showwarning = functools.partial(_hear, warnings.showwarning, threading.get_ident())
                output = self.call(model, x_t, t, cond)
        finally:
            _one.release()
        self._well = True
        return output


def _hear(show: Callable[..., None], thread: int, message: Any, category: Any, *where: Any, **more: Any) -> None:
    """Raise where a warning of this thread says that something trained gets no gradient; show what is not about that."""
    if LOST not in str(message) or threading.get_ident() != thread:
        show(message, category, *where, **more)
    elif _is_trained(sys._getframe()):
        raise ValueError(
            "`model` checkpoints with `use_reentrant=True` a part whose inputs have no gradient, as where only LoRA layers "
            "are trained: what is trained inside would get none. Use `use_reentrant=False`."
        )


def _is_trained(frame: FrameType | None) -> bool:
    """Whether the checkpoint that warns runs something that is trained, or something unknown."""
    while frame is not None and "run_function" not in frame.f_locals:
        frame = frame.f_back
    modules = list(_modules(frame.f_locals["run_function"])) if frame is not None else []
    return not modules or any(p.requires_grad for module in modules for p in module.parameters())


def _modules(run: Any) -> Iterator[nn.Module]:
    """The modules that a function is of, or holds."""
    if isinstance(run, nn.Module):
        yield run
    elif isinstance(run, functools.partial):
        for part in (run.func, *run.args, *run.keywords.values()):
            yield from _modules(part)
    elif isinstance(getattr(run, "__self__", None), nn.Module):
        yield run.__self__
    else:
        for cell in getattr(run, "__closure__", None) or ():
            yield from _modules(cell.cell_contents)
