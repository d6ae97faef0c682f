"""Count floating-point operations, with the formulas of torch.utils.flop_counter, and leave a model as it was."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Scores, and their product with the values."""
    heads, length, width = query.shape[:-2].numel(), query.shape[-2], query.shape[-1]
    return 2 * int(heads * length * key.shape[-2] * (width + value.shape[-1]))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Scores once more, and the gradients of the values, the scores, the query and the key."""
    heads, length, width = query.shape[:-2].numel(), query.shape[-2], query.shape[-1]
    return 2 * int(heads * length * key.shape[-2] * (3 * width + 2 * value.shape[-1]))


# the fused attention of a CPU, which torch counts as nothing; the formulas are those of a GPU's
_ON_CPU: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Flops(TorchDispatchMode):
    """Counts the operations of matrix products, attention and convolutions in `total` while it is entered.

    `FlopCounterMode` counts the same, and by module, for which it hooks every module and its inputs: with frozen weights or a
    sample that requires grad, those hooks raise.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = func if isinstance(func, HigherOrderOperator) else func.overloadpacket
        if key is not func and key not in flop_registry and func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if key in _ON_CPU:
            self.total += _ON_CPU[key](*args, **kwargs)
        elif key in flop_registry:
            self.total += int(flop_registry[key](*args, **kwargs, out_val=result))
        return result


@contextmanager
def counting(flops: Flops, *, grad: bool, keep: bool) -> Iterator[None]:
    """Count what runs inside. Attention runs in its plain form there, whose backward computes what is asked for and no more.

    Args:
        flops: the counter.
        grad: whether a graph is made.
        keep: whether the graph keeps what its backward needs; without, it only tells what depends on what.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(grad))
        if grad and not keep:
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)
            stack.enter_context(hooks)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(flops)
        yield


@contextmanager
def quiet(model: nn.Module, inputs: list[Tensor], *, frozen: bool = True) -> Iterator[None]:
    """Put a model into `eval()`, frozen if asked, and let `inputs` require grad; afterwards all is as before."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(tensor, tensor.requires_grad) for tensor in (*(model.parameters() if frozen else ()), *inputs)]
    try:
        model.eval()
        for tensor, _ in flags:
            tensor.requires_grad_(False)
        for tensor in inputs:
            tensor.requires_grad_(True)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for tensor, flag in flags:
            tensor.requires_grad_(flag)
