"""Modules that checkpoint themselves over their own parameters, as ADM's and CompVis' attention does."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from perceptual_diffusion.taps import hooked


def unfreeze(module: nn.Module, run: Callable[[], Any]) -> bool:
    """Let modules that checkpoint themselves have the gradient of their parameters, which is then dropped.

    The backward of such a function asks for the gradient of its inputs and of all its parameters at once, which fails
    where the parameters are frozen.

    Args:
        module: the frozen module.
        run: runs it with grad.

    Returns:
        whether there are any.
    """
    found: list[nn.Module] = []
    seen = set()

    def look(inner: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple | list) else (output,):
            node = tensor.grad_fn if isinstance(tensor, Tensor) else None
            function = getattr(type(node), "_forward_cls", type(None))
            own = "Checkpoint" in function.__name__ and not function.__module__.startswith("torch.")
            if own and node not in seen:  # the innermost module that gives this output
                seen.add(node)
                found.append(inner)

    hooked(run, [(inner, look) for inner in module.modules()])
    for inner in found:
        for parameter in inner.parameters():
            parameter.requires_grad_(True).register_post_accumulate_grad_hook(_drop)
    return bool(found)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
