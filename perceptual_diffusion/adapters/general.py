"""Find the middle of a model that nobody registered, from the names and the shape of its module tree.

No forward pass is run. These rules are tried in turn, first on the model, then one level down where a single child holds
most of it:

1. a child called mid, middle, bottleneck, ...: of several, the last;
2. a class nested in itself again and again: the innermost instance;
3. an encoder and a decoder (down and up, input and output, ...): what stands between them, else the encoder's last block;
4. the blocks on the sample's way, lists that follow each other joined: the block of index `total // 2`;
5. a plain stack of layers: its hidden layer in the middle.

Left out are lists on the side (text, conditions, embeddings, refiners, ...) and lists that are short beside the longest.
Sizes are counted in layers, not in parameters: sharding, quantisation and large embeddings do not change those.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from perceptual_diffusion import taps

Confidence = Literal["high", "medium"]
Item = tuple[str, nn.Module]
"""A dotted name and its module, out of its wrappers."""

MIDDLE = re.compile(r"mids?|mid(block|layer|level)s?|middle.*|bottlenecks?|bot|bottom|center|centre|bridges?")
DOWN = re.compile(r"down.*|d|descent|contract.*|input|in")
UP = re.compile(r"up(?!date|per).*|u|ascent|expan[ds].*|output|out|refine|deconv.*")
ENCODER, DECODER = re.compile(r"encs?|encoders?|encode"), re.compile(r"decs?|decoders?|decode")
SIDE = re.compile(
    r"adaln|adapters?|caps?|camera|caption|class|clip|cond|condition(er|ing)?|context|control(net)?|critic|ctx|"
    r"discriminator|ema|emb|embed(ding|der)?s?|face|film|gates?|hint|labels?|lora|loss|lpips|mapping|mod|modulation|motion|"
    r"first_stage.*|norms?|obs|pair|pos|pose|proj|project(ion|or)s?|ref|reference|refiners?|repa|skips?|style|teacher|text|tokenizer|txt|"
    r"vace|vae|vgg|vision"
)
"""What is beside the noisy sample's way."""
ENDS = re.compile(r"final|first|heads?|in|init|input|last|out|output|patch|post|pre|refinement|stem")
TIME = re.compile(r"freq|gamma|logvar|map|noise|sigma|t|time|timestep")
BLOCKS = re.compile(r".*(blocks?|layers?|levels?|stages?)|h|stream|transformer")
ALTERNATING = re.compile(r"attn|cross|ff|frame|freq|mlp|self|space|spatial|temporal|time")
DUAL, SINGLE = re.compile(r"double|dual|joint|mm|mmdit"), re.compile(r"single")
DENOISER = re.compile(r"denois.*|diffusion|dit|eps|epsilon|estimator|flow|score|unet|velocity")
MODELS = re.compile(r"denoisers|ensemble|experts|models|nets|networks|unets")


@dataclass(frozen=True)
class Middle:
    """The middle of a model.

    Attributes:
        layers: its dotted names, in the model without its wrappers.
        why: how it was found, in a few words.
        confidence: "high" where the model names its middle or has one clear trunk, "medium" for a plausible guess.
        candidates: dotted names of the layers it was chosen among, in the order they are declared.
    """

    layers: tuple[str, ...]
    why: str
    confidence: Confidence
    candidates: tuple[str, ...]


def middle(model: nn.Module) -> Middle:
    """Find the middle of a model by its module tree alone.

    Args:
        model: any module, also inside DDP, FSDP, PEFT or torch.compile.

    Returns:
        where the middle is, and why; the names are those of the model without its wrappers.

    Raises:
        ValueError: nothing in the tree tells; the message lists candidates.
    """
    model = taps.unwrap(model)
    found = _search(_Scope(model))
    if isinstance(found, Middle):
        return found
    names = found or [name for name, _ in _children(model)]
    listed = f"candidates: {', '.join(names[:8])}" if names else "it has no submodule"
    raise ValueError(
        f"the middle of {type(model).__name__} cannot be told from its modules; {listed}. Pass `layers=[...]` with the "
        "dotted name of the layer to compare, or use `adapters.register`."
    )


class _Scope:
    """A module and what it holds on the noisy sample's way.

    Attributes:
        path: what the names of the children begin with.
        children: the children that are not on the side, or all where none is left.
        lists: lists of modules among the children, and children numbered as a list would be.
    """

    def __init__(self, module: nn.Module, path: str = "") -> None:
        self.path = path
        every = list(_children(module, path))
        self.children = [item for item in every if not self.has(item[0], SIDE)] or every
        self.lists: dict[str, list[Item]] = {}
        if isinstance(module, nn.ModuleList | nn.Sequential):
            self.lists[path] = self.children
            return
        for name, child in self.children:
            stem = re.fullmatch(r"(.*?[^\d._])_?\d+", name)
            if stem is not None:
                self.lists.setdefault(stem[1], []).append((name, child))
            elif isinstance(child, nn.ModuleList | nn.Sequential | nn.ModuleDict):
                self.lists[name] = list(_parts(name, child))
        self.lists = {
            name: items for name, items in self.lists.items() if len(items) > (name not in dict(self.children))
        }

    def has(self, name: str, *patterns: re.Pattern[str]) -> bool:
        """Whether a word of the name, below the scope's own, fits a pattern."""
        return _has(name.removeprefix(self.path), *patterns)

    @property
    def total(self) -> int:
        return _weight(self.children)


def _search(scope: _Scope) -> Middle | list[str]:
    """Find the middle of a scope, or give the names that it could be."""
    for rule in (_named, _nested, _between, _along):
        found = rule(scope)
        if found is not None:
            return found
    return _stack(scope) or _single(scope) or []


def _named(scope: _Scope) -> Middle | None:
    """A child called middle; of several the last, by their numbers where they have some."""
    mids = [item for item in scope.children if scope.has(item[0], MIDDLE) and _block(item[1])]
    mids = [item for item in mids if not scope.has(item[0], re.compile(r"(up|down).*"))]
    if not mids:
        return None
    numbered = [item for item in mids if item[0][-1].isdigit()]
    name, module = max(numbered, key=lambda item: _number(item[0])) if numbered else mids[-1]
    return Middle((_last(name, module),), f"`{name}` is called a middle", "high", tuple(name for name, _ in mids))


def _nested(scope: _Scope) -> Middle | None:
    """A class whose instances are each inside the one before, with layers of its own around it."""
    instances: dict[type[nn.Module], list[Item]] = defaultdict(list)
    for name, child in scope.children:
        for inner, module in _walk(name, child):
            if not type(module).__module__.startswith("torch."):
                instances[type(module)].append((inner, module))
    for kind, chain in instances.items():
        pairs = list(zip(chain, chain[1:], strict=False))
        inside = all(b[0].startswith(f"{a[0]}.") and _size(a[1]) > _size(b[1]) + 1 for a, b in pairs)
        if len(chain) < 3 or not inside or 2 * _size(chain[0][1]) < scope.total:
            continue
        name, module = chain[-1]
        parts = [item for item in _children(module, f"{name}.") if _block(item[1])]
        layer = _last(*parts[0]) if len(parts) == 1 else name
        return Middle(
            (layer,), f"the innermost of {len(chain)} nested {kind.__name__}", "medium", tuple(n for n, _ in chain)
        )
    return None


def _between(scope: _Scope) -> Middle | list[str] | None:
    """What stands between an encoder and a decoder, or else the last block of the encoder."""
    lists, sure = scope.lists, "high"
    sides = {**lists, **{name: [(name, module)] for name, module in scope.children if name not in lists}}
    sides = {name: items for name, items in sides.items() if any(_block(module) for _, module in items)}
    down = [name for name in sides if scope.has(name, ENCODER, *([DOWN] if name in lists else []))]
    up = [name for name in sides if scope.has(name, DECODER, *([UP] if name in lists else [])) and name not in down]
    if up and not down:  # an encoder of another name has a block for each of the decoder's
        sure, length = "medium", max(len(sides[name]) for name in up)
        down = [
            name for name in lists if name in sides and name not in up and 1 < length >= len(lists[name]) >= length - 1
        ]
    if not down or not up:
        return None
    encoder, decoder = (max(names, key=lambda name: _weight(sides[name])) for names in (down, up))
    lowest = [name for name, _ in sides[decoder] if re.search(r"in\d+$", name)]
    if lowest:
        return Middle((lowest[-1],), f"the last block of the lowest resolution in `{decoder}`", "high", tuple(lowest))

    order = [name for name, _ in scope.children]
    taken = [{n for side in names for n in (side, *dict(sides[side]))} for names in (down, up)]
    rest = [
        (n, m)
        for n, m in scope.children
        if n in sides and n not in taken[0] | taken[1] and not scope.has(n, ENDS, TIME)
    ]
    start, end = (
        pick(order.index(n) for n in side if n in order) for pick, side in zip((max, min), taken, strict=True)
    )
    rest = [item for item in rest if order.index(item[0]) > start]
    rest = [item for item in rest if order.index(item[0]) < end] or rest
    around = _weight(sides[encoder]) + _weight(sides[decoder])
    if len(rest) == 1 and 10 * _size(rest[0][1]) > around:
        name, module = rest[0]
        if not _called(module) or _has_middle(module) or _size(module) > 2 * around:
            return _search(_Scope(module, f"{name}."))
        return Middle((name,), f"between `{encoder}` and `{decoder}`", "medium", (name,))

    whole = [name for name in (encoder, decoder) if name not in lists and _middle_below(sides[name][0][1])]
    if len(whole) == 1:  # one of them is the denoiser, the other reads the condition
        return _guess(_search(_Scope(sides[whole[0]][0][1], f"{whole[0]}.")))
    if whole:
        return whole
    if scope.has(encoder, ENCODER) and _reads_another(sides[decoder]):  # the encoder reads the condition
        blocks = {decoder: sides[decoder]} if decoder in lists else _Scope(sides[decoder][0][1], f"{decoder}.").lists
        return _guess(_halfway(scope, {name: _trunk(items) for name, items in blocks.items()}))
    blocks = lists if encoder in lists else _Scope(sides[encoder][0][1], f"{encoder}.").lists
    items = blocks.get(encoder) or max(blocks.values(), key=_weight, default=sides[encoder])
    why = f"the last of `{encoder}`, before `{decoder}`"
    return Middle((_last(*items[-1]),), why, "high" if sure == "high" else "medium", tuple(name for name, _ in items))


def _along(scope: _Scope) -> Middle | list[str] | None:
    """The block half-way along the lists of blocks, here or in the child that holds most of the model."""
    trunks = {name: _trunk(items) for name, items in scope.lists.items()}
    trunks = {name: blocks for name, blocks in trunks.items() if blocks}
    inside = {name for items in scope.lists.values() for name, _ in items} | set(scope.lists)
    others = [item for item in scope.children if item[0] not in inside and _block(item[1])]
    called = [item for item in others if scope.has(item[0], DENOISER)]  # beside encoders of the condition
    if called and len(called) < len(others):
        return (
            _guess(_search(_Scope(called[-1][1], f"{called[-1][0]}."))) if len(called) == 1 else [n for n, _ in called]
        )
    largest = max(others, key=lambda item: _size(item[1]), default=None)
    if largest is not None and _size(largest[1]) > sum(map(_weight, trunks.values())):
        if _size(largest[1]) > 0.6 * scope.total:
            return _search(_Scope(largest[1], f"{largest[0]}."))
        return [name for name, _ in others] + [_half(blocks) for blocks in trunks.values()]
    return _halfway(scope, trunks) if trunks else None


def _halfway(scope: _Scope, trunks: dict[str, list[Item]]) -> Middle | list[str]:
    """The block of index `total // 2` along all lists that are not short beside the longest."""
    most = max(map(_weight, trunks.values()), default=0)
    kept = {name: blocks for name, blocks in trunks.items() if 10 * _weight(blocks) > most}
    if len(kept) > 1:
        called = {name: blocks for name, blocks in kept.items() if scope.has(name, BLOCKS)}
        if 2 * sum(map(_weight, called.values())) < sum(map(_weight, kept.values())):
            return [_half(blocks) for blocks in kept.values()]
        kept = called
    models = [n for name, blocks in kept.items() for n, m in blocks if _has_middle(m) or scope.has(name, MODELS)]
    if models or not kept:
        return models
    names = sorted(kept, key=lambda name: scope.has(name, SINGLE))
    line = [item for name in names for item in kept[name]]
    sure: Confidence = "high" if len(names) == 1 or any(scope.has(name, DUAL, SINGLE) for name in names) else "medium"
    if (
        len(names) > 1
        and len({len(kept[name]) for name in names}) == 1
        and any(scope.has(n, ALTERNATING) for n in names)
    ):
        line, sure = [item for turn in zip(*kept.values(), strict=True) for item in turn], "medium"
    everything = tuple(name for name, _ in line)
    bottleneck = _before_a_skip(line)
    if bottleneck is not None:
        return Middle((bottleneck,), "the last block before a skip is joined", "medium", everything)
    where = " and ".join(f"`{name.rstrip('.') or 'the model'}`" for name in names)
    return Middle((_half(line),), f"block {len(line) // 2} of {len(line)} in {where}", sure, everything)


def _stack(scope: _Scope) -> Middle | None:
    """The hidden layer in the middle of a plain stack of layers, each with the activation after it."""
    stacks = []
    for label, items in scope.lists.items():
        layers: list[str] = []
        for name, module in items:
            if not layers or any(p.ndim > 1 for p in module.parameters()):
                layers.append(name)
            else:
                layers[-1] = name
        if not scope.has(label, SIDE, TIME):
            stacks.append(layers[:-1])
    stacks.sort(key=len, reverse=True)
    if not stacks or len(stacks[0]) < 2 or (len(stacks) > 1 and len(stacks[1]) > 1):
        return None
    hidden = stacks[0]
    half = len(hidden) // 2
    return Middle((hidden[half],), f"hidden layer {half} of {len(hidden)}", "medium", tuple(hidden))


def _single(scope: _Scope) -> Middle | None:
    """A single layer called middle."""
    mids = [name for name, _ in scope.children if scope.has(name, MIDDLE)]
    return Middle((mids[-1],), f"`{mids[-1]}` is called a middle", "high", tuple(mids)) if mids else None


# --- the tree ---------------------------------------------------------------------------------------------------------


def _kind(module: nn.Module) -> type[nn.Module]:
    """Give the class, of a checkpointed module the one inside."""
    return type(taps.unwrap(module._modules.get("_checkpoint_wrapped_module") or module))


def _parts(name: str, module: nn.Module) -> Iterator[Item]:
    """Give the direct children, with dotted names."""
    for key, child in module._modules.items():
        if child is not None:
            yield f"{name}.{key}".lstrip("."), taps.unwrap(child)


def _children(module: nn.Module, path: str = "") -> Iterator[Item]:
    """Give the children, and in place of a child that only groups others those others."""
    for name, child in _parts(path.rstrip("."), module):
        groups = type(child) is nn.Module or isinstance(child, nn.ModuleDict)
        blocks = any(_block(m) and _called(m) for m in child.children()) and not _has(name.removeprefix(path), MODELS)
        if groups and not blocks and not _has(name.removeprefix(path), MIDDLE):
            yield from _children(child, f"{name}.")
        else:
            yield name, child


def _walk(name: str, module: nn.Module) -> Iterator[Item]:
    """Give a module and all below it, but what is on the side."""
    yield name, module
    for part, child in _parts(name, module):
        if not _has(part.rpartition(".")[2], SIDE):
            yield from _walk(part, child)


def _trunk(items: list[Item]) -> list[Item]:
    """Give the blocks of a list: stages of several blocks opened, without what stands only once at its ends."""
    blocks: list[Item] = []
    for name, module in items:
        parts = list(_parts(name, module)) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        if len(parts) > 1 and len({_kind(part) for _, part in parts}) == 1 and all(_block(part) for _, part in parts):
            blocks += parts
        elif _block(module):
            blocks.append((name, module))
    kinds = [_kind(module) for _, module in blocks]
    repeated = [i for i, kind in enumerate(kinds) if kinds.count(kind) > 1]
    return blocks[repeated[0] : repeated[-1] + 1] if repeated else blocks


def _before_a_skip(blocks: list[Item]) -> str | None:
    """Give the last block before one that takes more channels than there were: in a U-Net kept as one flat list."""
    convs = [(name, next((m for m in block.modules() if hasattr(m, "in_channels")), None)) for name, block in blocks]
    widths = [(name, conv.in_channels, conv.out_channels) for name, conv in convs if conv is not None]
    if not widths or widths[-1][2] > widths[0][2]:
        return None
    return next((a[0] for a, b in zip(widths, widths[1:], strict=False) if b[1] > a[2]), None)


def _last(name: str, module: nn.Module) -> str:
    """Give the module itself or, where it is a container that is never called, its last part that is more than a layer."""
    while not _called(module):
        parts = [item for item in _children(module, f"{name}.") if _called(item[1]) or _block(item[1])]
        parts = [
            item for item in parts if _block(item[1]) or not type(item[1]).__module__.startswith("torch.")
        ] or parts
        if not parts:
            break
        name, module = parts[-1]
    return name


def _half(blocks: list[Item]) -> str:
    return _last(*blocks[len(blocks) // 2])


def _guess(found: Middle | list[str]) -> Middle | list[str]:
    return replace(found, confidence="medium") if isinstance(found, Middle) else found


def _middle_below(module: nn.Module) -> bool:
    return any(_has(name.rpartition(".")[2], MIDDLE) and _block(m) for name, m in _walk("", module))


def _has_middle(module: nn.Module) -> bool:
    return any(_has(name, MIDDLE) and not _has(name, SIDE) and _block(child) for name, child in _parts("", module))


def _reads_another(blocks: list[Item]) -> bool:
    """Whether transformer blocks attend to a second sequence."""
    names = [name for _, block in blocks for name, _ in block.named_modules()]
    convolutional = any(hasattr(module, "in_channels") for _, block in blocks for module in block.modules())
    return not convolutional and any("cross" in name or "multihead_attn" in name for name in names)


def _called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _block(module: nn.Module) -> bool:
    """Whether it is more than one layer."""
    return _size(module) > 1 or len(module._parameters) > 4


def _size(module: nn.Module) -> int:
    """Count the layers: modules without children, and those with parameters of their own."""
    return sum(not m._modules or bool(m._parameters) for m in module.modules() if _called(m))


def _weight(items: list[Item]) -> int:
    return sum(_size(module) for _, module in items)


def _number(name: str) -> int:
    return int(re.findall(r"\d+", name)[-1])


def _has(name: str, *patterns: re.Pattern[str]) -> bool:
    """Whether the name or a word of it, split at digits and capitals too, fits a pattern."""
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())
    return any(pattern.fullmatch(word) for pattern in patterns for word in (*words, name))
