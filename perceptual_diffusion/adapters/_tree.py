"""A model's module tree as the general rule sees it: names split into words, wrappers left out, sizes in layers."""

import re
from collections.abc import Iterable, Iterator

from torch import nn

from perceptual_diffusion import taps

Item = tuple[str, nn.Module]
"""A dotted name and its module, out of its wrapper."""

MIDDLE = re.compile(r"mids?|mid(block|layer|level)s?|middle.*|bottlenecks?|bot|bottom|center|centre|bridges?")
SIDE = re.compile(
    r"adaln|adapters?|caps?|caption|class|clip|cond|condition(er|ing)?|context|control(net)?|critic|ctx|discriminator|ema|"
    r"emb|embed(ding|der)?s?|film|first_stage.*|gates?|hint|labels?|lora|loss|lpips|mapping|mod|modulation|norms?|obs|pair|"
    r"pos|proj|project(ion|or)s?|ref|reference|refiners?|repa|skips?|style|teacher|text|tokenizer|txt|vace|vae|vgg|vision|"
    r".*(camera|face|motion|pose)_(encoder|module|net).*"
)
"""What is beside the noisy sample's way."""
MODELS = re.compile(r"denoisers|ensemble|experts|models|nets|networks|unets")


def has(name: str, *patterns: re.Pattern[str]) -> bool:
    """Whether the name or a word of it, split at digits and capitals too, fits a pattern."""
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())
    return any(pattern.fullmatch(word) for pattern in patterns for word in (*words, name))


def number(name: str) -> int:
    """Give the last number in a name; -1 where it does not end with one."""
    return int(re.findall(r"\d+", name)[-1]) if name[-1:].isdigit() else -1


# --- walking ----------------------------------------------------------------------------------------------------------


def parts(name: str, module: nn.Module) -> Iterator[Item]:
    """Give the direct children, with dotted names that leave out their wrappers, as those of a teacher's copy do."""
    for key, child in module._modules.items():
        if child is not None:
            yield f"{name}.{key}".lstrip("."), taps.unwrap(child)


def children(module: nn.Module, path: str = "") -> Iterator[Item]:
    """Give the children, and in place of a child that only groups others those others."""
    for name, child in parts(path.rstrip("."), module):
        own = name.removeprefix(path)
        groups = type(child) is nn.Module or isinstance(child, nn.ModuleDict)
        of_blocks = any(is_block(part) and is_called(part) for _, part in parts("", child)) and not has(own, MODELS)
        if groups and not of_blocks and not has(own, MIDDLE):
            yield from children(child, f"{name}.")
        else:
            yield name, child


def walk(name: str, module: nn.Module) -> Iterator[Item]:
    """Give a module and all below it, but what is on the side."""
    yield name, module
    for part, child in parts(name, module):
        if not has(part.rpartition(".")[2], SIDE):
            yield from walk(part, child)


def last(name: str, module: nn.Module) -> str:
    """Give the module itself or, where it is a container that is never called, its last part that is more than a layer."""
    while not is_called(module):
        inside = [(n, m) for n, m in children(module, f"{name}.") if is_called(m) or is_block(m)]
        inside = [(n, m) for n, m in inside if is_block(m) or not type(m).__module__.startswith("torch.")] or inside
        if not inside:
            break
        name, module = inside[-1]
    return name


# --- looking ----------------------------------------------------------------------------------------------------------


def is_called(module: nn.Module) -> bool:
    """Whether it has a forward pass: lists and bare modules have none."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def check_called(model: nn.Module, layers: Iterable[str]) -> None:
    """Raise unless each layer is a module that runs.

    Raises:
        ValueError: a layer does not exist, or is a list, which is never called itself.
    """
    for name in layers:
        module = taps.unwrap(taps.layer(model, name))
        if not is_called(module):
            held = ", ".join(f"'{name}.{key}'" for key in list(module._modules)[:3])
            raise ValueError(
                f"`layers` has {name!r}, a {type(module).__name__}, which is never called itself. Name a module in it"
                f"{f', such as {held}' if held else ''}."
            )


def is_block(module: nn.Module) -> bool:
    """Whether it is more than one layer."""
    return size(module) > 1 or len(module._parameters) > 4


def size(module: nn.Module) -> int:
    """Count the layers: modules without children, and those with parameters of their own."""
    return sum(not m._modules or bool(m._parameters) for m in module.modules() if is_called(m))


def weight(items: list[Item]) -> int:
    """Count the layers of a list."""
    return sum(size(module) for _, module in items)


def has_middle(module: nn.Module) -> bool:
    """Whether a child is called middle."""
    return any(has(name, MIDDLE) and not has(name, SIDE) and is_block(child) for name, child in parts("", module))


def has_middle_below(module: nn.Module) -> bool:
    """Whether anything in it is called middle."""
    return any(has(name.rpartition(".")[2], MIDDLE) and is_block(child) for name, child in walk("", module))


def channels(module: nn.Module) -> tuple[int, int] | None:
    """Give the channels into and out of the first convolution; None where there is none."""
    for part in module.modules():
        given, made = getattr(part, "in_channels", None), getattr(part, "out_channels", None)
        if isinstance(given, int) and isinstance(made, int):
            return given, made
    return None


def kind(module: nn.Module) -> type[nn.Module]:
    """Give the class, of a checkpointed module the one inside."""
    return type(taps.unwrap(module._modules.get("_checkpoint_wrapped_module") or module))


def trunk(items: list[Item]) -> list[Item]:
    """Give the blocks of a list, or nothing where no kind of block comes twice.

    Stages of several blocks of one kind are opened; what stands only once at the ends is left out.
    """
    blocks: list[Item] = []
    for name, module in items:
        inside = list(parts(name, module)) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        if len(inside) > 1 and len({kind(m) for _, m in inside}) == 1 and all(is_block(m) for _, m in inside):
            blocks += inside
        elif is_block(module):
            blocks.append((name, module))
    kinds = [kind(module) for _, module in blocks]
    repeated = [i for i, one in enumerate(kinds) if kinds.count(one) > 1]
    if not repeated:
        return blocks if len(items) == 1 else []
    return blocks[repeated[0] : repeated[-1] + 1]
