"""Run a model up to named layers, return their outputs, and leave nothing behind."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perceptual_diffusion._shapes import map_tensors
from perceptual_diffusion.types import FeatureSelect


class _Stop(BaseException):
    """Leaves a forward pass once every layer has been seen. Not an Exception, so that models do not catch it."""


def unwrap(model: nn.Module) -> nn.Module:
    """Give the module inside DDP, FSDP, DataParallel, AveragedModel, torch.compile and PEFT wrappers.

    LoRA layers are part of what is inside.
    """
    while True:
        inner = model._modules.get(_held_under(model))
        if inner is None:
            return model
        model = inner


def _held_under(model: nn.Module) -> str:
    """Give the name under which a wrapper holds the wrapped module; empty where it is no wrapper."""
    for name in ("_orig_mod", "_fsdp_wrapped_module"):
        if name in model._modules:
            return name
    for cls in type(model).__mro__:
        if cls.__name__ in ("DistributedDataParallel", "DataParallel", "AveragedModel"):
            return "module"
        if cls.__module__.startswith("peft."):
            if cls.__name__ in ("PeftModel", "PeftMixedModel"):
                return "base_model"
            if cls.__name__ == "BaseTuner":
                return "model"
    return ""


def layer(model: nn.Module, name: str) -> nn.Module:
    """Give the submodule of a dotted name.

    Raises:
        ValueError: there is none; the message lists what is there.
    """
    module, path = model, type(model).__name__
    for part in name.split("."):
        child = module._modules.get(part) or unwrap(module)._modules.get(part)
        if child is None:
            there = "at its top level" if module is model else f"in {path}"
            names = ", ".join(n for n, m in module._modules.items() if m is not None) or "no module"
            raise ValueError(f"no module {name!r} in {type(model).__name__}; {there}: {names}.")
        module, path = child, f"{path}.{part}" if module is not model else part
    return module


def select(output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Take the noisy sample's stream out of a layer's output.

    A tensor is itself. Of a tuple, it is the tensor with the shape of the layer's first input (joint blocks return
    (text, image) or (image, text)), else the first tensor (down blocks return (hidden, residuals)).
    """
    if isinstance(output, Tensor):
        return output
    tensors = [item for item in output if isinstance(item, Tensor)] if isinstance(output, tuple | list) else []
    if not tensors:
        raise ValueError(
            f"the tapped layer returns {type(output).__name__}, which holds no tensor. Tap a layer that returns one."
        )
    inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    same = [item for item in tensors if inputs and item.shape == inputs[0].shape]
    if len(same) > 1:
        raise ValueError(
            f"the tapped layer returns {len(same)} tensors of its input's shape {tuple(same[0].shape)}, so which of them is "
            "the noisy sample's stream cannot be told. Tap another layer, or register an adapter with a `select`."
        )
    return (same or tensors)[0]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, tuple | list) else []


def run(
    model: nn.Module,
    layers: Sequence[str],
    call: Callable[[], Any],
    *,
    select: FeatureSelect = select,
    stop: bool = True,
) -> list[Any]:
    """Run `call`, which runs `model`, and return the outputs of the named layers.

    Args:
        model: the module that holds the layers.
        layers: dotted names, at least one.
        call: runs the model; what it returns is ignored.
        select: takes what is wanted out of a layer's output.
        stop: leave the pass as soon as every layer has been seen.

    Returns:
        what `select` took, one per name, in the order of `layers`; of a layer that runs several times, the first.

    Raises:
        ValueError: a layer does not exist, did not run, or gives no floating tensor.
    """
    seen: dict[str, Any] = {}
    grad = torch.is_grad_enabled()
    signal = _Stop()

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name in seen:
                return
            seen[name] = select(output, args, kwargs)
            if stop and len(seen) == len(set(layers)):
                raise signal
            # What runs next may write into the feature, so it is copied; but not inside a reentrant checkpoint, which
            # runs without grad and gives its output a graph afterwards.
            if torch.is_grad_enabled() == grad:
                seen[name] = map_tensors(Tensor.clone, seen[name])

        return hook

    modules = {name: layer(model, name) for name in layers}
    handles = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in modules.items()]
    try:
        call()
    except _Stop as caught:
        if caught is not signal:
            raise
        signal.__traceback__ = None  # its frames hold every activation on the way
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in layers if name not in seen]
    if missing:
        raise ValueError(
            f"the layer {missing[0]!r} of {type(model).__name__} did not run in this pass. Tap one that does."
        )
    for name in layers:
        if not any(tensor.is_floating_point() for tensor in _tensors(seen[name])):
            raise ValueError(f"the layer {name!r} gives no floating tensor. Tap another one.")
    return [seen[name] for name in layers]
