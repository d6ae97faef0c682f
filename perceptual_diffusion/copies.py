"""A frozen copy of a model, without the tensors that no pass up to the tapped layers uses.

Which those are is seen in a pass on an alias of the model: the same tree over the same memory, with modes and hooks of its
own, so that the model itself notices nothing. What is left out is never allocated.
"""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from perceptual_diffusion import taps

_T = TypeVar("_T")

CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing", "use_checkpoint", "checkpoint")
"""Attributes by which models switch gradient checkpointing on: of diffusers, timm, ADM and CompVis."""


class Missing:
    """Stands for a tensor that the copy does not hold; whoever uses it is told so."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"the teacher's copy no longer holds {self.name!r}, which the pass that it was cut by did not use but this one "
            "does. Give `example`, or without it the first pass, every condition that is used later, or wrap with "
            "`truncate=False`."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copying and pickling ask of every object
            raise AttributeError(name)
        return self._refuse()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        next(item for item in _walk([*args, *(kwargs or {}).values()]) if isinstance(item, cls))._refuse()

    __getitem__ = __iter__ = __len__ = __bool__ = __float__ = _refuse
    __add__ = __sub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = __neg__ = _refuse


class Seen(TorchFunctionMode):
    """Records which modules a pass runs, and which tensors it hands to torch functions."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[nn.Module] = set()
        self.used: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.used.update(id(item) for item in _walk([*args, *(kwargs or {}).values()]))
        return func(*args, **(kwargs or {}))

    def spare(self, model: nn.Module, layers: Sequence[str]) -> set[nn.Module]:
        """Give the modules that did not run and of whose own tensors none was used.

        Lists of which some ran, and which do not lead to a layer, are not among them: the next pass may take others (experts).
        """
        apart = self.used - {id(x) for module in self.ran for x in _own(module)}  # used, and not by running its module
        kept = {m for m in model.modules() if m in self.ran or any(id(x) in apart for x in _own(m))}
        for name, module in model.named_modules():
            a_list = isinstance(module, nn.ModuleList | nn.ModuleDict)
            if a_list and not any(f"{layer}.".startswith(f"{name}.") for layer in layers):
                inside = set(module.modules())
                kept |= set() if kept.isdisjoint(inside) else inside
        return {m for m in model.modules() if m not in kept}

    def watching(self, model: nn.Module, run: Callable[[], _T]) -> _T:
        """Run something, and record the modules that run in it; entering `self` records the tensors."""

        def ran(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.ran.add(module)

        return taps.hooked(run, [(module, ran) for module in model.modules()], before=True)


def frozen_copy(
    model: nn.Module, *, without: Collection[nn.Module] = (), dtype: torch.dtype | None = None
) -> nn.Module:
    """Copy a model with its weights: in `eval()`, frozen, without hooks, gradients and gradient checkpointing.

    Args:
        model: the model, also inside DDP or torch.compile.
        without: modules of it whose own tensors are left out, and never allocated.
        dtype: floating parameters are cast to this; buffers, norms with statistics and what diffusers keeps in float32 stay
            as they are.

    Raises:
        ValueError: the model is partitioned over processes, offloaded, or cannot be copied.
    """
    model = taps.unwrap(model)
    held = {id(tensor) for module in model.modules() if module not in without for tensor in _own(module)}
    return copy_tree(model, _copies(model, held, dtype))


def alias_copy(model: nn.Module) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """Copy a model's tree over the same parameters: frozen, in `eval()`, without hooks. Buffers are copied.

    Args:
        model: the model, also inside DDP or torch.compile.

    Returns:
        the copy, and the modules of the model by those of the copy.

    Raises:
        ValueError: as `frozen_copy`.
    """
    model = taps.unwrap(model)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        own = nn.Parameter(parameter.detach(), requires_grad=False) if parameter.requires_grad else parameter
        memo[id(parameter)] = own
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().clone()
    copied = copy_tree(model, memo)
    return copied, {memo[id(module)]: module for module in model.modules()}


def cut(model: nn.Module, spare: Collection[nn.Module]) -> None:
    """Take the modules' own tensors out of a model, by putting other modules into their places."""
    held = {id(tensor) for module in model.modules() if module not in spare for tensor in _own(module)}
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if module in spare and any(id(tensor) not in held for tensor in _own(module)):
            replaced[module] = emptied = object.__new__(type(module))
            vars(emptied).update(vars(module))
            for table in ("_parameters", "_buffers"):
                items = getattr(module, table).items()
                vars(emptied)[table] = {
                    key: Missing(f"{name}.{key}") if x is not None and id(x) not in held else x for key, x in items
                }
            vars(emptied)["_modules"] = dict(module._modules)
            _hide(emptied)
    for module in [*model.modules(), *replaced.values()]:
        for name, child in module._modules.items():
            if child in replaced:
                module._modules[name] = replaced[child]


def same_storage(model: nn.Module, other: nn.Module) -> bool:
    """Whether two modules share any parameter's memory."""
    mine = {p.data_ptr() for p in model.parameters() if p.numel()}
    return any(p.data_ptr() in mine for p in other.parameters() if p.numel())


def bare(module: nn.Module) -> nn.Module:
    """Give the module inside the wrappers of DDP, torch.compile and torch's checkpointing."""
    while True:
        module = taps.unwrap(module)
        held = module._modules.get("_checkpoint_wrapped_module")
        if held is None:
            return module
        module = held


def copy_tree(model: nn.Module, memo: dict[int, Any], inner: Callable[[nn.Module], nn.Module] = bare) -> nn.Module:
    """Copy a model's modules around the tensors that `memo` has for its own: frozen, in `eval()`, without hooks.

    Args:
        model: the model, unwrapped.
        memo: as for `copy.deepcopy`, by the ids of tensors; it is added to.
        inner: gives the module to copy in place of one: what a wrapper or a LoRA layer is laid around.

    Raises:
        ValueError: as `frozen_copy`.
    """
    _check_whole(model)
    for module in model.modules():
        if (hook := vars(module).get("_hf_hook")) is not None:  # accelerate's, which may hold the weights once more
            memo[id(hook)] = None
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
        for module in reversed(list(model.modules())):  # from the inside out
            if (held := inner(module)) is not module:
                memo[id(module)] = copy.deepcopy(held, memo)
        copied: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:  # whatever a model holds may refuse in its own way
        raise ValueError(f"`model` cannot be copied: {error}. Copy it yourself and pass it as `teacher=`.") from error
    for name, module in list(copied.named_modules()):
        _hide(module)
        state = vars(module)
        _check_forward(name, module)
        if state.get("_hf_hook", ...) is None:
            del state["_hf_hook"]
            state["forward"] = state.pop("_old_forward")
            if getattr(state["forward"], "__func__", None) is type(module).forward:
                del state["forward"]
        for flag in CHECKPOINTING:
            if state.get(flag) is True:
                state[flag] = False
    return copied.eval().requires_grad_(False)


def _check_forward(name: str, module: nn.Module) -> None:
    """Take off a compiled `forward` of the module's own; refuse another function in its place, which runs the original."""
    forward = vars(module).get("forward")
    if not isinstance(forward, FunctionType) or "_hf_hook" in vars(module):
        return
    compiled = inspect.unwrap(forward) if hasattr(forward, "_torchdynamo_orig_callable") else None
    if getattr(compiled, "__func__", None) is not type(module).forward:
        raise ValueError(
            f"`model` cannot be copied: `forward` of {name or 'its top'!r} is a function that was put there, and would run the "
            "original's weights. Call `wrap` before it is, or pass a copy of your own as `teacher=`."
        )
    del vars(module)["forward"]


def _check_whole(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if taps.partitioned(parameter):
            raise ValueError(
                f"`model` is partitioned ({name!r} is not whole on this process). Call `wrap` before FSDP or DeepSpeed partitions it."
            )
        if parameter.device.type == "meta":
            raise ValueError(
                f"`model` has no values for {name!r}: it is on the meta device, not loaded yet or offloaded. Load it, and call "
                "`wrap` before it is offloaded."
            )
    hooked = any("_hf_hook" in vars(module) for module in model.modules())
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if hooked and len(devices) > 1:
        raise ValueError(
            f"`model` is dispatched over {' and '.join(devices)}, expected one device. Load it without a `device_map`, or pass "
            "a copy of your own as `teacher=`."
        )
    for name, module in model.named_modules():
        hooks = getattr(vars(module).get("_diffusers_hook"), "hooks", None)
        if hooks:  # their closures would run the original in the copy's place
            raise ValueError(
                f"`model` has diffusers' hook {next(iter(hooks))!r} at {name or 'its top'!r}, which cannot be copied. Call "
                "`wrap` before it is added."
            )


def _copies(model: nn.Module, held: set[int], dtype: torch.dtype | None) -> dict[int, Any]:
    """The tensors of a copy by the ids of the model's: copied one by one, and cast on the way; or stand-ins.

    A tensor of a class of its own (quantised) is left to that class.
    """
    pinned = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters()
        if not set(name.split(".")).isdisjoint(getattr(module, "_keep_in_fp32_modules", None) or ())
        or (
            isinstance(module, _NormBase) and module.track_running_stats
        )  # its kernel takes weights like its statistics
    }
    copies: dict[int, Any] = {}
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in copies:
                continue
            is_parameter = key in module._parameters
            if id(tensor) not in held:
                copies[id(tensor)] = Missing(f"{name}.{key}".lstrip("."))
            elif type(tensor).__module__.split(".")[0] == "torch":
                casts = is_parameter and tensor.is_floating_point() and tensor.itemsize > 1 and id(tensor) not in pinned
                value = tensor.detach().to(dtype if dtype is not None and casts else tensor.dtype, copy=True)
                copies[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
    return copies


def _hide(module: nn.Module) -> None:
    """Put the stand-ins where reading an attribute finds them, and walking over parameters and buffers does not."""
    for table in (module._parameters, module._buffers):
        for key, value in table.items():
            if isinstance(value, Missing):
                table[key], vars(module)[key] = None, value


def _own(module: nn.Module) -> list[Tensor]:
    return [x for x in (*module._parameters.values(), *module._buffers.values()) if x is not None]


def _walk(value: Any) -> Iterator[Any]:
    """The tensors and stand-ins inside lists, tuples and dicts."""
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, list | tuple | dict):
            yield from _walk(item)
        elif isinstance(item, Tensor | Missing):
            yield item
