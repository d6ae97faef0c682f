"""Run passes without leaving a trace, and see what a teacher runs on."""

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_pre_hook


@contextlib.contextmanager
def same_randomness() -> Iterator[None]:
    """Leave the global random streams of torch and Python where they are: what runs inside always starts there."""
    state = random.getstate()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)


@contextlib.contextmanager
def untouched(model: nn.Module, teacher: Any) -> Iterator[None]:
    """Put everything back at the end: weights, gradients, buffers, modes, the teacher's parts.

    Meanwhile gradients are None, and hooks that run once a gradient is accumulated (optimizers in the backward) sleep.

    Args:
        model: the student.
        teacher: the teacher; one that drops parts on its first pass gets them back.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    values = [(x, x.detach().clone()) for x in (*trained, *model.buffers())]
    modes = [(m, m.training) for m in model.modules()]
    grads = [(p, p.grad) for p in model.parameters()]
    hooks = [h for p in model.parameters() if (h := getattr(p, "_post_accumulate_grad_hooks", None))]
    asleep = [dict(h) for h in hooks]
    inner = getattr(teacher, "module", None)
    parts = [(m, dict(m._modules)) for m in inner.modules()] if isinstance(inner, nn.Module) else []
    state = dict(vars(teacher)) if hasattr(teacher, "__dict__") else {}
    for p, _ in grads:
        p.grad = None
    for h in hooks:
        h.clear()
    try:
        yield
    finally:
        for p, grad in grads:
            p.grad = grad
        for h, entries in zip(hooks, asleep, strict=True):
            h.update(entries)
        for m, training in modes:
            m.training = training
        with torch.no_grad():
            for value, before in values:
                if not torch.equal(value, before):
                    value.copy_(before)
        for m, children in parts:
            m._modules.clear()
            m._modules.update(children)
        if state:
            vars(teacher).clear()
            vars(teacher).update(state)


class Watch:
    """Sees which modules a teacher runs, and their weights as they are at that moment.

    A context manager: at its end the gradients and buffers of what ran are as before.

    Args:
        teacher: the teacher, any callable; the modules of its `module`, if it has one, count as well.
    """

    def __init__(self, teacher: Any) -> None:
        inner = getattr(teacher, "module", None)
        self.modules: dict[nn.Module, None] = dict.fromkeys(inner.modules() if isinstance(inner, nn.Module) else ())
        self._ran: set[nn.Module] = set()
        self._held: dict[Tensor, Tensor | None] = {}
        self._seen: dict[Tensor, Tensor] = {}
        self._buffers: dict[Tensor, Tensor] = {}

    def __enter__(self) -> "Watch":
        for module in self.modules:
            self.hold(module._parameters.values())
        return self

    def __exit__(self, *args: Any) -> None:
        for parameter, grad in self._held.items():
            parameter.grad = grad
        with torch.no_grad():
            for buffer, before in self._buffers.items():
                buffer.copy_(before)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """See the modules that run inside."""

        def see(module: nn.Module, args: Any) -> None:
            self._ran.add(module)
            self.modules[module] = None
            self.hold(module._parameters.values())
            for parameter in module._parameters.values():
                if parameter is not None and parameter not in self._seen:
                    self._seen[parameter] = _fingerprint(parameter)
            for buffer in module._buffers.values():
                if buffer is not None and module.training and buffer not in self._buffers:
                    self._buffers[buffer] = buffer.clone()

        handle = register_module_forward_pre_hook(see)
        try:
            yield
        finally:
            handle.remove()

    def hold(self, parameters: Iterable[Tensor | None]) -> None:
        """Count weights to the teacher's, and put their gradients aside."""
        for parameter in parameters:
            if parameter is not None and parameter not in self._held:
                self._held[parameter], parameter.grad = parameter.grad, None

    @property
    def parameters(self) -> list[Tensor]:
        """The teacher's weights."""
        return list(self._held)

    def ran(self, modules: Iterable[nn.Module]) -> bool:
        """Tell whether any of these modules has run."""
        return not self._ran.isdisjoint(modules)

    def shares(self, parameters: Iterable[Tensor]) -> bool:
        """Tell whether the teacher runs on any of these weights, or on their memory."""
        memory = {_memory(p) for p in parameters}
        return any(_memory(p) in memory for p in self._held)

    def moved(self) -> bool:
        """Tell whether a weight is no longer what it was when its module ran."""
        return any(not torch.equal(before, _fingerprint(p)) for p, before in self._seen.items())


def parameters_of_graph(value: Tensor) -> Iterator[Tensor]:
    """Give the parameters that a backward from here would reach."""
    todo: list[Any] = [value.grad_fn]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            yield node.variable
        todo.extend(following for following, _ in node.next_functions)


def acts_in_training(module: nn.Module) -> bool:
    """Tell whether a module by itself computes something else in train mode."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, _NormBase):
        return module.track_running_stats
    return type(module).__name__ in ("DropPath", "StochasticDepth")


def _fingerprint(parameter: Tensor) -> Tensor:
    """Two numbers that change with a weight; none where its dtype has none."""
    try:
        wide = parameter.detach().float()
        return torch.stack([wide.sum(), wide.square().sum()])
    except (RuntimeError, NotImplementedError, TypeError):  # a quantised subclass
        return torch.zeros(0)


def _memory(parameter: Tensor) -> int:
    try:
        return parameter.data_ptr() or id(parameter)
    except RuntimeError:  # a subclass without memory of its own
        return id(parameter)
