"""Count the bytes that a graph keeps for its backward. On fake tensors too, where nothing is run."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class SavedBytes:
    """Counts the bytes that graphs made inside keep for their backward.

    A storage counts once, whole, however many tensors and views of it are kept, from the first of them until the graph lets
    go of the last. Tensors that an autograd function keeps as attributes, and not by `save_for_backward`, are not seen; nor is
    what checkpointing computes anew during the backward. Nested calls of `torch.autograd.grad` are counted as they come.

    Args:
        excluding: modules and tensors whose storages do not count: the weights, which are held anyway.

    Attributes:
        now: bytes kept at this moment.
        peak: the most that were kept at once.
        hooks: torch's own context manager, to be entered in place of this one where an interrupt may come.
    """

    def __init__(self, excluding: Iterable[nn.Module | Tensor] = ()) -> None:
        self.now = self.peak = 0
        self._excluded = {storage._cdata: storage for tensor in _tensors_of(excluding) for storage in storages(tensor)}
        self._kept: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> Self:
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.hooks.__exit__(*exception)

    def _pack(self, tensor: Tensor) -> "_Held":
        held = _Held(tensor.detach())  # with its graph, an output would keep itself alive
        for storage in storages(tensor):
            key, size = storage._cdata, storage.nbytes()
            if key in self._excluded:
                continue
            if key not in self._kept:
                self._kept[key] = 0
                self.now += size
                self.peak = max(self.peak, self.now)
            self._kept[key] += 1
            weakref.finalize(held, self._release, key, size).atexit = False
        return held

    def _release(self, key: int, size: int) -> None:
        self._kept[key] -= 1
        if not self._kept[key]:
            del self._kept[key]
            self.now -= size


class _Held:
    """What a graph keeps in place of a tensor. It keeps the tensor alive, so no other storage gets its address."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Give the storages under a tensor: several under a quantised or nested one, none under a sparse one."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [storage for name in names for storage in storages(getattr(tensor, name))]
    return [tensor.untyped_storage()] if tensor.layout == torch.strided else []


def _tensors_of(items: Iterable[nn.Module | Tensor]) -> Iterator[Tensor]:
    for item in items:
        if isinstance(item, nn.Module):
            yield from item.parameters()
            yield from item.buffers()
        else:
            yield item
