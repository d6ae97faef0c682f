"""The state of torch around the teacher's passes, put back where an exception leaves it changed.

Whatever changes it for a moment puts it back itself. But an interrupt (Ctrl-C, or an exception that a signal's handler
raises) may come between any two steps of Python: inside of `torch.no_grad`'s `__enter__`, say, or before an `__exit__` has begun.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class NoFastPath(AbstractContextManager["NoFastPath"]):
    """Without torch's kernels for attention in eval mode without grad: they round otherwise than the pass with grad.

    Their switch is one of the process. So it is off as long as any thread is inside, and the last to leave puts it back.
    """

    lock = threading.RLock()
    inside: dict["NoFastPath", int] = {}
    """Who is inside, by its thread."""
    enabled = True
    """The switch as it is without them."""

    def __enter__(self) -> "NoFastPath":
        with self.lock:
            NoFastPath.enabled = self.outside()
            self.inside[self] = threading.get_ident()
            torch.backends.mha.set_fastpath_enabled(False)
        return self

    def __exit__(self, *args: Any) -> None:
        with self.lock:
            if self.inside.pop(self, None) is not None and not self.inside:
                torch.backends.mha.set_fastpath_enabled(self.enabled)

    @classmethod
    def outside(cls) -> bool:
        """Give the switch as it is when nobody is inside."""
        return cls.enabled if cls.inside else torch.backends.mha.get_fastpath_enabled()

    @classmethod
    def of_thread(cls) -> list["NoFastPath"]:
        """Give those of this thread, the outermost first."""
        return [one for one, thread in cls.inside.items() if thread == threading.get_ident()]


class Before:
    """Modes, autocast and random numbers as they are now, to be put back by `restore`.

    Args:
        device: of the pass, for its autocast and its generator.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.grad = torch.is_grad_enabled()
        self.autocast: tuple[bool, torch.dtype] | None = None
        if torch.amp.is_autocast_available(device.type):
            self.autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        self.cached = torch.is_autocast_cache_enabled()
        self.nesting = _nesting()
        self.modes = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
        with NoFastPath.lock:
            self.fast_path, self.slow = NoFastPath.outside(), len(NoFastPath.of_thread())
        self.random = Kept(None, device)

    def restore(self) -> None:
        """Put everything back that is not as it was."""
        while torch._C._len_torch_function_stack() > self.modes[0]:
            torch._C._pop_torch_function_stack()
        while torch._C._len_torch_dispatch_stack() > self.modes[1]:
            torch._C._pop_torch_dispatch_stack(None)
        torch.set_grad_enabled(self.grad)
        if self.autocast is not None:
            torch.set_autocast_enabled(self.device.type, self.autocast[0])
            torch.set_autocast_dtype(self.device.type, self.autocast[1])
        torch.set_autocast_cache_enabled(self.cached)
        while _nesting() > self.nesting:  # else the cast weights were kept for the next step
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
        with NoFastPath.lock:
            for one in NoFastPath.of_thread()[self.slow :]:
                del NoFastPath.inside[one]
            torch.backends.mha.set_fastpath_enabled(self.fast_path and not NoFastPath.inside)
        self.random.restore()


def _nesting() -> int:
    try:
        return torch.autocast_increment_nesting() - 1
    finally:
        torch.autocast_decrement_nesting()


class Kept:
    """The buffers of a module and the states of torch's generators as they are now, to be put back by `restore`.

    Args:
        module: whose buffers; what is no module has none.
        device: where its passes run, for the generator there.
    """

    def __init__(self, module: Any, device: torch.device) -> None:
        parts = module.modules() if isinstance(module, nn.Module) else ()
        tables = [part._buffers for part in parts]
        self.buffers = [(of, name, x, x.detach().clone()) for of in tables for name, x in of.items() if x is not None]
        self.random: list[tuple[Callable[[Tensor], None], Tensor]] = [(torch.set_rng_state, torch.get_rng_state())]
        if device.type == "cuda" and (not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing()):
            return
        if device.type not in ("cpu", "meta"):
            generators, which = torch.get_device_module(device), {} if device.type == "mps" else {"device": device}
            self.random.append((partial(generators.set_rng_state, **which), generators.get_rng_state(**which)))

    def restore(self) -> None:
        """Put them back, also where a pass has set another tensor in a buffer's place."""
        for table, name, buffer, before in self.buffers:
            now = table.get(name)
            if now is not None and (now.shape, now.dtype) != (before.shape, before.dtype):
                continue  # a cache that has grown: what says how far it reaches is no buffer, and stays
            buffer.data.copy_(before)  # unseen by graphs of other passes, for which nothing changes
            table[name] = buffer
        for set_state, state in self.random:
            set_state(state)
