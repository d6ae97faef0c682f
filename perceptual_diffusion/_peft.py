"""What PEFT has put into a model, told by the names of its classes, so that PEFT need not be installed.

Modules are reached through `_modules`, not `modules()`: PEFT's layer for attention replaces its weights whenever it is
listed.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from perceptual_diffusion.copies import bare

ALTERING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How the initialisations of LoRA begin that subtract from the base weights."""


def is_tuner(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT's around a layer of the model: LoRA, DoRA, LoHa, OFT and others."""
    return _is(module, "BaseTunerLayer")


def is_volatile(module: nn.Module) -> bool:
    """Whether a layer of PEFT's makes the base weights anew in every pass, as the one for `nn.MultiheadAttention` does."""
    return is_tuner(module) and _is(module, "MultiheadAttention")


def clean(module: nn.Module) -> nn.Module:
    """Give the module that was there before PEFT, DDP and torch.compile: of a LoRA layer what it is laid around."""
    while True:
        module = bare(module)
        if is_tuner(module):
            held: Any = module.base_layer
        elif _is(module, "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper"):
            held = module.original_module
        else:
            return module
        module = held


def _is(module: nn.Module, *names: str) -> bool:
    return any(cls.__name__ in names and cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def walk(module: nn.Module, seen: set[int] | None = None) -> Iterator[nn.Module]:
    """Every module, PEFT's among them, each once, parents first."""
    seen = set() if seen is None else seen
    if id(module) not in seen:
        seen.add(id(module))
        yield module
        for child in module._modules.values():
            if child is not None:
                yield from walk(child, seen)


def walk_clean(module: nn.Module, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Every module as it was before PEFT, with its dotted name, each once, parents first."""
    seen, module = set() if seen is None else seen, clean(module)
    if id(module) not in seen:
        seen.add(id(module))
        yield path, module
        for name, child in module._modules.items():
            if child is not None:
                yield from walk_clean(child, f"{path}.{name}" if path else name, seen)


def tuners(model: nn.Module) -> list[tuple[Any, ...]]:
    """Every layer of PEFT's in a model, with those inside of it where several are laid around one, outermost first."""
    inside: set[int] = set()
    found = []
    for module in walk(model):
        if not is_tuner(module) or id(module) in inside:
            continue
        chain: list[Any] = [module]
        while is_tuner(inner := bare(chain[-1].base_layer)):
            chain.append(inner)
        inside.update(map(id, chain))
        found.append(tuple(chain))
    return found


def configs(holders: list[nn.Module]) -> list[Any]:
    """The configurations of the adapters that modules have been given."""
    return [config for module in holders for config in (vars(module).get("peft_config") or {}).values()]


def altering(config: Any) -> str | None:
    """Give the initialisation by which an adapter alters the base weights when it is added, if it does."""
    kind = getattr(config, "init_lora_weights", None)
    if isinstance(kind, str) and kind.lower().startswith(ALTERING):
        return kind
    return "kasa" if getattr(config, "kasa_config", None) is not None else None


def unmerged(tuner: nn.Module) -> nn.Module:
    """Give a copy of what a layer of PEFT's is laid around, with the merged adapters taken out of the weights."""
    with torch.no_grad():
        copied = copy.deepcopy(tuner)
        layers: list[Any] = [module for module in walk(copied) if is_tuner(module)]
        for layer in layers:
            if layer.merged_adapters:
                layer.unmerge()
    return clean(copied)
