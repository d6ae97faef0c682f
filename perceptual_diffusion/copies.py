"""A frozen copy of a model, and what of it a pass needs."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from perceptual_diffusion import taps


class Dropped(nn.Module):
    """Stands where the teacher held a module that no pass up to the last tapped layer runs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"the teacher's copy no longer holds {self.name!r}, which its first pass did not run but this one does. "
            "Give the first pass every condition that is used later, or wrap with `truncate=False`."
        )

    forward = __iter__ = __getitem__ = __contains__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copying, pickling and hooks ask of every module
            raise AttributeError(name)
        return self._refuse()  # also to `hasattr`, whose answer would change the pass


class Used(TorchFunctionMode):
    """Records which parameters and buffers a pass hands to torch functions."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, Tensor):
                    self.ids.add(id(item))
        return func(*args, **(kwargs or {}))


def drop(module: nn.Module, ran: set[nn.Module], used: set[int], layers: Sequence[str], path: str = "") -> None:
    """Replace every largest submodule of which nothing ran and nothing was used; lists keep their length.

    A list of which some ran, and which does not lead to a layer, is kept: the next pass may take others (experts).
    """
    for name, child in list(module.named_children()):
        where = f"{path}{name}"
        tensors = [*child.parameters(), *child.buffers()]
        needed = any(m in ran for m in child.modules()) or any(id(tensor) in used for tensor in tensors)
        a_list = isinstance(child, nn.ModuleList | nn.ModuleDict)
        if a_list and needed and not any(f"{layer}.".startswith(f"{where}.") for layer in layers):
            continue
        if needed or a_list:
            drop(child, ran, used, layers, f"{where}.")
        elif tensors:
            module._modules[name] = Dropped(where)


def frozen_copy(model: nn.Module) -> nn.Module:
    """Copy a model with its weights: in `eval()`, frozen, without the hooks and gradients of the original.

    Raises:
        ValueError: the model is partitioned over processes or cannot be copied.
    """
    model = taps.unwrap(model)
    for name, parameter in model.named_parameters():
        partitioned = any(hasattr(parameter, mark) for mark in ("ds_id", "_is_flat_param", "_fsdp_flattened"))
        if partitioned or type(parameter).__name__ == "DTensor":
            raise ValueError(
                f"`model` is partitioned ({name!r} is not whole on this process). Call `wrap` before FSDP or DeepSpeed partitions it."
            )
    memo: dict[int, Any] = {}
    for module in model.modules():
        for table in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            # hooks stay with the original; but weight_norm and spectral_norm compute the weight in theirs
            kept = ((k, hook) for k, hook in table.items() if type(hook).__module__.startswith("torch.nn.utils"))
            memo[id(table)] = OrderedDict(kept)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # whatever a model holds may refuse in its own way
        raise ValueError(f"`model` cannot be copied: {error}. Copy it yourself and pass it as `teacher=`.") from error
    for module in list(copied.modules()):  # parts compiled on their own
        for name, child in list(module.named_children()):
            module._modules[name] = taps.unwrap(child)
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.grad = None
    return copied.eval().requires_grad_(False)


def same_storage(model: nn.Module, other: nn.Module) -> bool:
    """Whether two modules share any parameter's memory."""
    mine = {p.data_ptr() for p in model.parameters() if p.numel()}
    return any(p.data_ptr() in mine for p in other.parameters() if p.numel())
