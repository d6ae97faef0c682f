"""Run a model up to named layers, return their outputs, and leave nothing behind."""

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from perceptual_diffusion._shapes import map_tensors
from perceptual_diffusion.types import FeatureSelect

_T = TypeVar("_T")

_GATHERING = frozenset(("FSDPModule", "FullyShardedDataParallel", "DeepSpeedEngine"))
"""Classes of modules that gather weights in a pass."""
_MARKS = frozenset(("ds_id", "_is_flat_param", "_fsdp_flattened"))
"""Attributes by which ZeRO-3 and FSDP1 mark parameters."""


class _Stop(BaseException):
    """Leaves a forward pass once every layer has been seen. Not an Exception, so that models do not catch it."""

    model: nn.Module


_running: ContextVar[tuple[_Stop, ...]] = ContextVar("running", default=())
"""The passes that run in this thread, one inside of the other: a watched layer also runs in those inside of its own."""


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
        child = module._modules.get(part)
        if child is None:  # asked for by itself: a compiled module has no truth
            child = unwrap(module)._modules.get(part)
        if child is None:
            there = "at its top level" if module is model else f"in {path}"
            names = ", ".join(n for n, m in module._modules.items() if m is not None) or "no module"
            raise ValueError(f"no module {name!r} in {type(model).__name__}; {there}: {names}.")
        module, path = child, f"{path}.{part}" if module is not model else part
    return module


def path(model: nn.Module, name: str) -> list[nn.Module]:
    """Give the modules through which a layer is reached, with wrappers, from the model to the layer itself.

    Raises:
        ValueError: there is no such layer.
    """
    layer(model, name)
    on_path = [model]
    for part in name.split("."):
        while part not in on_path[-1]._modules:
            on_path.append(on_path[-1]._modules[_held_under(on_path[-1])])  # type: ignore[arg-type]
        on_path.append(on_path[-1]._modules[part])  # type: ignore[arg-type]
    return on_path


def may_stop(model: nn.Module, layers: Sequence[str]) -> bool:
    """Whether a pass may be left by an exception at the layers.

    It may not where modules gather, load or cast their weights before they run and undo that afterwards: sharded, or with hooks
    of accelerate or diffusers. Some would stay gathered.
    """
    return not _is_offloaded(model, layers) and not gathered(model)


def gathered(model: nn.Module) -> bool:
    """Whether any weights are gathered from other processes in a pass: by FSDP, ZeRO-3 or tensor parallelism."""
    modules = list(model.modules())
    return any(not _GATHERING.isdisjoint(_names(kind.__mro__)) for kind in {*map(type, modules)}) or any(
        partitioned(parameter) for module in modules for parameter in module._parameters.values()
    )


def partitioned(parameter: Tensor | None) -> bool:
    """Whether this process holds only a part of a parameter."""
    return parameter is not None and (type(parameter).__name__ == "DTensor" or not _MARKS.isdisjoint(vars(parameter)))


def several_processes() -> bool:
    """Whether torch.distributed joins this process with others."""
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1


def largest(values: Sequence[int], device: torch.device) -> list[int]:
    """Give the largest of each number over all processes, which all have to ask; the host waits once."""
    most = torch.tensor(values, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    found: list[int] = most.tolist()
    return found


def _is_offloaded(model: nn.Module, layers: Sequence[str]) -> bool:
    """Whether there are hooks of accelerate or diffusers: they are on every leaf with weights, or on what holds leaves."""
    leaf = next((module for module in model.modules() if module._parameters), model)
    states = (vars(module) for name in layers for module in (leaf, *path(model, name)))
    return any("_hf_hook" in state or "_diffusers_hook" in state for state in states)


@lru_cache(maxsize=1024)
def _names(bases: tuple[type, ...]) -> frozenset[str]:
    """The names of the classes of a module: other packages' classes are known without an import."""
    return frozenset(base.__name__ for base in bases)


def _sharded(modules: list[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if "FSDPModule" in _names(type(module).__mro__)]


def _gather(modules: list[Any], gradient: Tensor) -> None:
    """Bring the weights back that the backward needs; FSDP2 takes them away again when it is through the module."""
    for module in modules:
        module.unshard()


def _keeping(model: nn.Module, layers: Sequence[str]) -> AbstractContextManager[Any]:
    """Let the graph keep the weights as they are in the pass, where they are taken out of the module before the backward."""
    if torch.is_grad_enabled() and _is_offloaded(model, layers):
        return torch.autograd.graph.saved_tensors_hooks(_detach, lambda tensor: tensor)
    return nullcontext()


def _detach(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.is_leaf and not tensor.requires_grad else tensor


def _eager(model: nn.Module, layers: Sequence[str]) -> AbstractContextManager[Any]:
    """Without torch.compile where the hooks would lie inside of what is compiled, which leaves them out."""
    for name in layers:
        *above, last = path(model, name)
        compiled = any("_orig_mod" in module._modules for module in above)
        if compiled or any(module._compiled_call_impl is not None for module in (*above, last)):
            stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
            return stance
    return nullcontext()


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


def hooked(
    run: Callable[[], _T], hooks: Collection[tuple[nn.Module, Callable[..., Any]]], *, before: bool = False
) -> _T:
    """Give what `run` returns, run with forward hooks on modules, which are taken off again.

    They see the passes of this thread alone: another's may meet them half registered. They are found by themselves and not by
    their handles, and taken off twice: an interrupt may come between any two steps, also after a hook is on and before its
    handle is kept, or among the removals.

    Args:
        run: what is run.
        hooks: modules, and for each a function of (module, args, kwargs, output), or without `output`.
        before: whether they run before their module.
    """
    thread = threading.get_ident()

    def own(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda module, args, *rest: hook(module, args, *rest) if threading.get_ident() == thread else None

    hooks = [(module, own(hook)) for module, hook in hooks]

    def take_off() -> None:
        for module, hook in hooks:
            table = module._forward_pre_hooks if before else module._forward_hooks
            marks = module._forward_pre_hooks_with_kwargs if before else module._forward_hooks_with_kwargs
            for key in [key for key, one in list(table.items()) if one is hook]:
                marks.pop(key, None)
                table.pop(key, None)

    try:
        try:
            for module, hook in hooks:
                register = module.register_forward_pre_hook if before else module.register_forward_hook
                register(hook, with_kwargs=True)
            return run()
        finally:
            take_off()
    finally:
        take_off()


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
    stop: bool | None = None,
) -> list[Any]:
    """Run `call`, which runs `model`, and return the outputs of the named layers.

    Args:
        model: the module that holds the layers.
        layers: dotted names, at least one.
        call: runs the model; what it returns is ignored.
        select: takes what is wanted out of a layer's output.
        stop: leave the pass as soon as every layer has been seen; by default where `may_stop` allows it.

    Returns:
        what `select` took, one per name, in the order of `layers`; of a layer that runs several times, the first.

    Raises:
        ValueError: a layer does not exist, did not run, or gives no floating tensor.
    """
    seen: dict[str, Any] = {}
    grad = torch.is_grad_enabled()
    signal = _Stop()
    signal.model = model

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            own = [other for other in _running.get() if other.model is model][-1:] == [signal]
            if name in seen or not own:
                return
            seen[name] = select(output, args, kwargs)
            if stop and len(seen) == len(set(layers)):
                raise signal
            # What runs next may write into the feature, so it is copied; but not inside a reentrant checkpoint, which
            # runs without grad and gives its output a graph afterwards.
            if torch.is_grad_enabled() == grad:
                seen[name] = map_tensors(Tensor.clone, seen[name])
            for tensor in _tensors(seen[name]):
                if tensor.requires_grad and sharded.get(name):
                    tensor.register_hook(partial(_gather, sharded[name]))

        return hook

    modules = {name: layer(model, name) for name in layers}
    if stop is None:
        stop = may_stop(model, layers)
    # FSDP2 gathers a module for its backward when the gradient reaches its output; that of what holds the layer it never does.
    sharded = {} if stop else {name: _sharded(path(model, name)[:-1]) for name in layers}
    hooks = [(module, watch(name)) for name, module in modules.items()]
    outer = _running.get()
    try:
        try:
            _running.set((*outer, signal))
            with _eager(model, layers), _keeping(model, layers):
                hooked(call, hooks)
        finally:
            _running.set(outer)
    except _Stop as caught:
        if caught is not signal:
            raise
        signal.__traceback__ = None  # its frames hold every activation on the way
    finally:
        _running.set(outer)
    missing = [name for name in layers if name not in seen]
    if missing:
        raise ValueError(
            f"the layer {missing[0]!r} of {type(model).__name__} did not run in this pass. Tap one that does."
        )
    for name in layers:
        if not any(tensor.is_floating_point() for tensor in _tensors(seen[name])):
            raise ValueError(f"the layer {name!r} gives no floating tensor. Tap another one.")
    return [seen[name] for name in layers]
