"""What a step of the objective costs next to a step of MSE, in floating-point operations.

The objective adds to the MSE step two forwards up to the last tapped layer, of the true and of the predicted pair, and the
backward of the second to its input only. All are counted by running them, on fake tensors if need be.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from perceptual_diffusion import taps
from perceptual_diffusion._shapes import leaves
from perceptual_diffusion.inspection.flops import Flops, counting, quiet
from perceptual_diffusion.types import Sample


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Floating-point operations of a step, and the weights that its teacher holds.

    Attributes:
        forward: one forward.
        mse: one step of MSE, forward and backward.
        to_layers: a forward up to the last tapped layer.
        to_input: the backward from the tapped layers to the sample, without gradients of weights.
        held: parameters that a truncated copy of the model holds.
        held_share: of all parameters, 0 to 1.
        counted: False where the backward could not be run: twice the forward is then taken for a full backward, once for
            one to the input.
    """

    forward: int
    mse: int
    to_layers: int
    to_input: int
    held: int
    held_share: float
    counted: bool

    @property
    def ratio(self) -> float:
        """A step of the objective over a step of MSE."""
        return (self.mse + 2 * self.to_layers + self.to_input) / max(1, self.mse)


def step_cost(model: nn.Module, run: Callable[[], Any], layers: Sequence[str], *, sample: Sample) -> StepCost:
    """Count the operations of a step.

    Parameters that are frozen count as frozen in the MSE step, so that LoRA training has its own figures.

    Args:
        model: the model, also inside DDP; of a compiled one pass the original.
        run: runs it and gives its output.
        layers: dotted names of the tapped layers.
        sample: the noisy sample that `run` gives it, (B, *) or nested, without a graph of its own.

    Returns:
        the cost.

    Raises:
        ValueError: a layer does not exist or did not run.
    """
    model = taps.unwrap(model)
    inputs = [leaf for leaf in leaves(sample) if leaf.is_floating_point()]
    used = _Used()

    def tapped() -> Any:
        with used:
            return taps.run(model, layers, run, select=_floating)

    with used.watching(model):
        forward, backward = _count(model, run, [], frozen=False)
        used.forget()
        to_layers, to_input = _count(model, tapped, inputs, frozen=True)
    counted = backward is not None and to_input is not None
    held = sum(p.numel() for module in used.kept(model) for p in module.parameters(recurse=False))
    return StepCost(
        forward=forward,
        mse=forward + (2 * forward if backward is None else backward),
        to_layers=to_layers,
        to_input=to_layers if to_input is None else to_input,
        held=held,
        held_share=held / max(1, sum(p.numel() for p in model.parameters())),
        counted=counted,
    )


def _count(model: nn.Module, run: Callable[[], Any], inputs: list[Tensor], *, frozen: bool) -> tuple[int, int | None]:
    """Operations of a forward, and of the backward from all that it gives, or None where that cannot be run."""
    flops = Flops()
    try:
        with quiet(model, inputs, frozen=frozen), counting(flops, grad=True, keep=True):
            given = [tensor for tensor in _walk(run()) if tensor.requires_grad]
            forward = flops.total
            trained = inputs or [p for p in model.parameters() if p.requires_grad]
            if given and trained:
                torch.autograd.grad([tensor.sum() for tensor in given], trained, allow_unused=True)
            return forward, flops.total - forward
    except (
        RuntimeError,
        TypeError,
        NotImplementedError,
    ):  # a kernel without a backward, such as FlexAttention's on a CPU
        flops = Flops()
        with quiet(model, []), counting(flops, grad=False, keep=False):
            run()
        return flops.total, None


def _floating(output: Any, args: Any, kwargs: Any) -> list[Tensor]:
    return [tensor for tensor in _walk(output) if tensor.is_floating_point()]


def _walk(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in _walk(item)]


class _Used(TorchFunctionMode):
    """Notes the modules that start and the tensors that torch functions are given."""

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """Start anew."""
        self.tensors: set[int] = set()
        self.started: set[nn.Module] = set()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Note the modules that start inside."""
        handles = [m.register_forward_pre_hook(lambda module, args: self.started.add(module)) for m in model.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tensors.update(id(tensor) for tensor in _walk([*args, *(kwargs or {}).values()]))
        return func(*args, **(kwargs or {}))

    def kept(self, model: nn.Module) -> list[nn.Module]:
        """The modules that a truncated copy keeps: those in which something started or was used."""
        return [
            module
            for module in model.modules()
            if module is model
            or any(inner in self.started for inner in module.modules())
            or any(id(tensor) in self.tensors for tensor in (*module.parameters(), *module.buffers()))
        ]
