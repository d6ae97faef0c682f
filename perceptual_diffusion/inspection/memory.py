"""Count bytes: what a graph keeps for its backward, and what is alive at once. On fake tensors too, where nothing is run."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from perceptual_diffusion._memory import SavedBytes, storages

__all__ = ["LiveBytes", "SavedBytes", "weights_held"]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside and still alive, temporaries and gradients among them.

    What exists before it is entered does not count; nor does what one operation uses and frees inside itself.

    Attributes:
        now: bytes alive at this moment.
        peak: the most that were alive at once.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = list(_walk(result))
        given = {s._cdata for tensor in _walk([args, kwargs or {}]) for s in storages(tensor)} if made else ()
        for tensor in made:
            for storage in storages(tensor):
                key = storage._cdata
                if key not in self._alive and key not in given:
                    self._alive.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._release, key, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.now)
        return result

    def _release(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def weights_held(modules: Iterable[nn.Module], *, beside: Iterable[nn.Module] = ()) -> tuple[int, int]:
    """Give the number and the bytes of the parameters that `modules` hold and `beside` does not, each storage once."""
    known = {storage._cdata for module in beside for p in module.parameters() for storage in storages(p)}
    number = size = 0
    for parameter in (p for module in modules for p in module.parameters()):
        new = {storage._cdata: storage.nbytes() for storage in storages(parameter)}
        if known.isdisjoint(new):
            number, size = number + parameter.numel(), size + sum(new.values())
            known.update(new)
    return number, size


def _walk(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _walk(item)
