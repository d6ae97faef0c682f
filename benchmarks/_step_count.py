"""What a step is counted by: operations, bytes kept, bytes alive; and the limit, from the model alone."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from perceptual_diffusion.inspection.flops import Flops, quiet
from perceptual_diffusion.inspection.memory import LiveBytes, SavedBytes


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step that is ready to be run.

    Attributes:
        run: forward, loss and backward, from gradients of None.
        trained: what is trained beside the model: a projector.
        held: the networks that it holds beside the model.
    """

    run: Callable[[], None]
    trained: Sequence[nn.Module] = ()
    held: Sequence[nn.Module] = ()


@dataclass(frozen=True, kw_only=True)
class Count:
    """Operations of a step, and the most bytes that its graphs kept, and that were alive, at once.

    Alive is what is kept and what is under way: temporaries and gradients of activations, but not those of weights.
    """

    flops: int
    saved: int
    live: int


def count(step: Step, model: nn.Module) -> Count:
    """Count one step. Weights do not count, nor do their gradients, which are dropped as soon as they are made."""
    modules = [model, *step.trained, *step.held]
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(_drop) for p in trained]
    gc.collect()
    saved, live, flops = SavedBytes(modules), LiveBytes(), Flops()
    try:
        with saved, live, flops:
            step.run()
    finally:
        for handle in handles:
            handle.remove()
    return Count(flops=flops.total, saved=saved.peak, live=live.peak)


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Operations of the parts of a step: a forward up to a layer, and the backward from there to the sample alone."""

    forward: int
    to_layer: int
    to_input: int

    @property
    def added(self) -> int:
        """What the objective adds at least: two forwards to the layer and one backward to the input."""
        return 2 * self.to_layer + self.to_input


def parts(model: nn.Module, layer: str, sample: torch.Tensor, call: Callable[[torch.Tensor], object]) -> Parts:
    """Count the parts with a hook that only looks: nothing of the package's taps, copies or teachers is used."""
    flops, seen = Flops(), []

    def note(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        tensors = [output] if isinstance(output, torch.Tensor) else list(output)
        seen.append((flops.total, tensors))

    sample = sample.detach().clone()
    handle = model.get_submodule(layer).register_forward_hook(note, with_kwargs=True)
    try:
        with quiet(model, [sample]), flops:
            call(sample)
            forward = flops.total
            to_layer, tensors = seen[0]
            # of a joint block's two streams the loss reads the sample's; the text's part of the block is not needed back
            like = max(tensors, key=lambda x: x.shape[1] if x.ndim == 3 else x.numel())
            torch.autograd.grad(like.sum(), sample)
            return Parts(forward=forward, to_layer=to_layer, to_input=flops.total - forward)
    finally:
        handle.remove()


def seconds(step: Step) -> float:
    """Time the process spends on one step."""
    start = time.process_time()
    step.run()
    return time.process_time() - start
