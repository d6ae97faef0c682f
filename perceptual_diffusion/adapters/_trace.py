"""What of a model runs only after the tapped layers, seen before there is any data: on fake tensors, with made-up inputs."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from perceptual_diffusion import taps
from perceptual_diffusion._shapes import batch_size, map_tensors
from perceptual_diffusion.adapters.examples import example
from perceptual_diffusion.copies import Seen, alias_copy
from perceptual_diffusion.precision import Precision
from perceptual_diffusion.schedules import Schedule
from perceptual_diffusion.types import ModelCall

_T = TypeVar("_T")

LEAST = 2**28
"""Bytes of parameters from which on leaving some out is worth the seconds that a pass on fake tensors takes."""


def after_layers(
    model: nn.Module, call: ModelCall, schedule: Schedule, layers: Sequence[str], *, least: int = LEAST
) -> set[nn.Module] | None:
    """Give the modules that start only after the last tapped layer has ended, and of which nothing is used before.

    A pass up to its end is made on fake tensors: without arithmetic, without memory, and without a trace in the model. What
    does not run in it may belong to a condition that was not made up, so it is given only where all that holds it is.

    Args:
        model: a model of diffusers, also inside DDP or torch.compile.
        call: the family's call, t in the schedule's unit.
        schedule: the schedule.
        layers: dotted names of the tapped layers.
        least: bytes of parameters from which on it is worth the seconds that it takes.

    Returns:
        modules of `model`; None where it is not, no inputs can be made, or the pass cannot be run on fake tensors.

    Raises:
        ValueError: the model cannot be copied, or a layer does not exist.
    """
    inner = taps.unwrap(model)
    if sum(parameter.nbytes for parameter in inner.parameters()) < least:
        return None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            clean, cond = example(inner)
    except (TypeError, ValueError):
        return None
    alias, originals = alias_copy(inner)
    order = _Order(alias, layers)
    device = next((parameter.device for parameter in alias.parameters()), torch.device("cpu"))
    try:
        with _silent(), mode, torch.no_grad():
            t = schedule.at(torch.full((batch_size(clean),), 0.5, dtype=torch.float64))
            t, clean, cond = map_tensors(lambda x: x.to(device), (t if schedule.discrete else t.float(), clean, cond))
            (clean, cond), run = Precision(alias)(clean, cond)
            with order:
                order.watching(alias, lambda: run(lambda: call(alias, clean, t, cond)))
    except Exception:  # it looks at values, or has a kernel without a rule for fake tensors
        return None
    return {originals[module] for module in order.after(alias, layers)} if order.past else None


class _Order(Seen):
    """Sees what a pass runs and uses up to the last layer, and what it starts after that.

    Args:
        model: the model.
        layers: dotted names of the layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.layers = {taps.layer(model, name) for name in layers}
        self.late: set[nn.Module] = set()
        self.past = False

    def watching(self, model: nn.Module, run: Callable[[], _T]) -> _T:
        """Run something, and see the order of what runs in it."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            (self.late if self.past else self.ran).add(module)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            ended.add(module)
            self.past = self.past or ended == self.layers

        ended: set[nn.Module] = set()
        entering, leaving = [(module, enter) for module in model.modules()], [(module, leave) for module in self.layers]
        return taps.hooked(lambda: taps.hooked(run, leaving), entering, before=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.past:
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def after(self, model: nn.Module, layers: Sequence[str]) -> set[nn.Module]:
        """Give what can be left out of a pass up to the layers, whatever the conditions."""
        untouched = self.spare(model, layers)
        holders: dict[nn.Module, list[nn.Module]] = {}
        for module in model.modules():
            for child in module.children():
                holders.setdefault(child, []).append(module)
        found = self.late & untouched
        while more := {
            module
            for module in untouched - found
            if module in holders and all(holder in found for holder in holders[module])
        }:
            found |= more
        return found


@contextmanager
def _silent() -> Iterator[None]:
    """Keep what fake tensors and diffusers say of what they cannot do to themselves."""
    loggers = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "diffusers")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
