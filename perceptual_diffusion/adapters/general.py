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
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from torch import nn

from perceptual_diffusion import taps
from perceptual_diffusion.adapters import _tree as tree
from perceptual_diffusion.adapters._tree import MIDDLE, MODELS, SIDE, Item

Confidence = Literal["high", "medium"]

DOWN = re.compile(r"down.*|d|descent|contract.*|input|in")
UP = re.compile(r"up(?!date|per).*|u|ascent|expan[ds].*|output|out|refine|deconv.*")
ENCODER, DECODER = re.compile(r"encs?|encoders?|encode"), re.compile(r"decs?|decoders?|decode")
ENDS = re.compile(r"final|first|heads?|in|init|input|last|out|output|patch|post|pre|refinement|stem")
TIME = re.compile(r"freq|gamma|logvar|map|noise|sigma|t|time|timestep")
BLOCKS = re.compile(r".*(blocks?|layers?|levels?|stages?)|h|stream|transformer")
ALTERNATING = re.compile(r"attn|cross|ff|frame|freq|mlp|self|space|spatial|temporal|time")
DUAL, SINGLE = re.compile(r"double|dual|joint|mm|mmdit"), re.compile(r"single")
DENOISER = re.compile(r"denois.*|diffusion|dit|eps|epsilon|estimator|flow|score|unet|velocity")


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


Found = Middle | list[str]
"""The middle, or the names that it could be."""


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
    names = found or [name for name, _ in tree.children(model)]
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
        every = list(tree.children(module, path))
        self.children = [item for item in every if not self.has(item[0], SIDE)] or every
        self.lists: dict[str, list[Item]] = {}
        if isinstance(module, nn.ModuleList | nn.Sequential):
            if tree.trunk(self.children) or not any(tree.is_block(child) for _, child in self.children):
                self.lists[path] = self.children
                return
        numbered: dict[str, list[Item]] = defaultdict(list)
        for name, child in self.children:
            stem = re.fullmatch(r"(.*?[^\d._])_?\d+", name)
            if stem is not None:
                numbered[stem[1]].append((name, child))
            elif isinstance(child, nn.ModuleList | nn.Sequential | nn.ModuleDict) and len(child):
                self.lists[name] = list(tree.parts(name, child))
        self.lists |= {stem: items for stem, items in numbered.items() if len(items) > 1}

    def has(self, name: str, *patterns: re.Pattern[str]) -> bool:
        """Whether a word of the name, below the scope's own, fits a pattern."""
        return tree.has(name.removeprefix(self.path), *patterns)

    def inside(self, name: str) -> "_Scope":
        """Give the scope of a child."""
        return _Scope(dict(self.children)[name], f"{name}.")


def _search(scope: _Scope) -> Found:
    for rule in (_named, _nested, _between, _along, _stack, _single):
        found = rule(scope)
        if found is not None:
            return found
    return []


def _guess(found: Found) -> Found:
    return replace(found, confidence="medium") if isinstance(found, Middle) else found


def _names(items: list[Item]) -> tuple[str, ...]:
    return tuple(name for name, _ in items)


def _named(scope: _Scope) -> Middle | None:
    """A child called middle; of several the last, by their numbers where they have some."""
    mids = [(n, m) for n, m in scope.children if scope.has(n, MIDDLE) and tree.is_block(m)]
    mids = [(n, m) for n, m in mids if not scope.has(n, re.compile(r"(up|down).*"))]
    if not mids:
        return None
    highest = max(tree.number(name) for name, _ in mids)
    name, module = [item for item in mids if tree.number(item[0]) == highest][-1]
    return Middle((tree.last(name, module),), f"`{name}` is called a middle", "high", _names(mids))


def _nested(scope: _Scope) -> Middle | None:
    """A class whose instances are each inside the one before, with layers of its own around it."""
    instances: dict[type[nn.Module], list[Item]] = defaultdict(list)
    for child in scope.children:
        for name, module in tree.walk(*child):
            if not type(module).__module__.startswith("torch."):
                instances[type(module)].append((name, module))
    for cls, chain in instances.items():
        each = all(b[0].startswith(f"{a[0]}.") and tree.size(a[1]) > tree.size(b[1]) + 1 for a, b in pairwise(chain))
        if len(chain) < 3 or not each or 2 * tree.size(chain[0][1]) < tree.weight(scope.children):
            continue
        name, module = chain[-1]
        held = [item for item in tree.children(module, f"{name}.") if tree.is_block(item[1])]
        layer = tree.last(*held[0]) if len(held) == 1 else name
        return Middle((layer,), f"the innermost of {len(chain)} nested {cls.__name__}", "medium", _names(chain))
    return None


def _between(scope: _Scope) -> Found | None:
    """What stands between an encoder and a decoder, or else the last block of the encoder."""
    lists = scope.lists
    sides = lists | {name: [(name, module)] for name, module in scope.children if name not in lists}
    sides = {name: items for name, items in sides.items() if any(tree.is_block(module) for _, module in items)}
    down = [n for n in sides if scope.has(n, ENCODER) or (n in lists and scope.has(n, DOWN))]
    up = [n for n in sides if scope.has(n, DECODER) or (n in lists and scope.has(n, UP))]
    up = [n for n in up if n not in down]
    longest = max((len(sides[n]) for n in up), default=0)
    unnamed = not down
    if unnamed:  # an encoder of another name has a block for each of the decoder's
        down = [n for n in lists if n in sides and n not in up and 1 < longest >= len(lists[n]) >= longest - 1]
    if not down or not up:
        return None
    encoder, decoder = (max(names, key=lambda name: tree.weight(sides[name])) for names in (down, up))
    lowest = [name for name, _ in sides[decoder] if re.search(r"in\d+$", name)]
    if lowest:
        return Middle((lowest[-1],), f"the last block of the lowest resolution in `{decoder}`", "high", tuple(lowest))

    around = tree.weight(sides[encoder] + sides[decoder])
    bottleneck = _bottleneck(scope, sides, down, up)
    if bottleneck is not None and 10 * tree.size(bottleneck[1]) > around:
        name, module = bottleneck
        if not tree.is_called(module) or tree.has_middle(module) or tree.size(module) > 2 * around:
            return _search(scope.inside(name))
        return Middle((name,), f"between `{encoder}` and `{decoder}`", "medium", (name,))

    whole = [name for name in (encoder, decoder) if name not in lists and tree.has_middle_below(sides[name][0][1])]
    if whole:  # the one is the denoiser, the other reads the condition
        return _guess(_search(scope.inside(whole[0]))) if len(whole) == 1 else whole
    if scope.has(encoder, ENCODER) and _reads_another(sides[decoder]):
        blocks = {decoder: sides[decoder]} if decoder in lists else scope.inside(decoder).lists
        return _guess(_halfway(scope, {name: tree.trunk(items) for name, items in blocks.items()}))
    blocks = {encoder: lists[encoder]} if encoder in lists else scope.inside(encoder).lists
    items = max(blocks.values(), key=tree.weight, default=sides[encoder])
    tokens = not any(tree.channels(module) for _, module in items)
    why = f"the last of `{encoder}`, before `{decoder}`"
    return Middle((tree.last(*items[-1]),), why, "medium" if unnamed or tokens else "high", _names(items))


def _bottleneck(scope: _Scope, sides: dict[str, list[Item]], down: list[str], up: list[str]) -> Item | None:
    """The only child declared between the two sides or, where none is, after both."""
    order = [name for name, _ in scope.children]
    taken = [{n for name in names for n in (name, *_names(sides[name]))} for names in (down, up)]
    start, end = max(map(order.index, taken[0] & {*order})), min(map(order.index, taken[1] & {*order}))
    rest = [(n, m) for n, m in scope.children[start + 1 :] if n in sides and n not in taken[0] | taken[1]]
    rest = [(n, m) for n, m in rest if not scope.has(n, ENDS, TIME)]
    rest = [(n, m) for n, m in rest if order.index(n) < end] or rest
    return rest[0] if len(rest) == 1 else None


def _reads_another(blocks: list[Item]) -> bool:
    """Whether transformer blocks attend to a second sequence."""
    names = [name for _, block in blocks for name, _ in block.named_modules()]
    cross = any("cross" in name or "multihead_attn" in name for name in names)
    return cross and not any(tree.channels(block) for _, block in blocks)


def _along(scope: _Scope) -> Found | None:
    """The block half-way along the lists of blocks, here or in the child that holds most of the model."""
    for name, items in scope.lists.items():
        models = scope.has(name, MODELS) or any(tree.has_middle(module) for _, module in items)
        if models and len(items) > 1 and 2 * tree.weight(items) > tree.weight(scope.children):
            return list(_names(items))  # a cascade or an ensemble
    trunks = {name: blocks for name, items in scope.lists.items() if (blocks := tree.trunk(items))}
    inside = {name for label in trunks for name in (label, *_names(scope.lists[label]))}
    others = [item for item in scope.children if item[0] not in inside and tree.is_block(item[1])]
    denoisers = [name for name, _ in others if scope.has(name, DENOISER)]
    if denoisers and len(denoisers) < len(others) and not trunks:  # the others read the condition
        return _guess(_search(scope.inside(denoisers[0]))) if len(denoisers) == 1 else denoisers
    name, module = max(others, key=lambda item: tree.size(item[1]), default=("", nn.Identity()))
    if name and tree.size(module) > sum(map(tree.weight, trunks.values())):
        if tree.size(module) > 0.6 * tree.weight(scope.children):
            return _search(scope.inside(name))
        if trunks:
            return [*_names(others), *map(_half, trunks.values())]
    return _halfway(scope, trunks) if trunks else None


def _halfway(scope: _Scope, trunks: dict[str, list[Item]]) -> Found:
    """The block of index `total // 2` along all lists that are not short beside the longest."""
    most = max(map(tree.weight, trunks.values()), default=0)
    kept = {name: blocks for name, blocks in trunks.items() if 10 * tree.weight(blocks) > most}
    called = {name: blocks for name, blocks in kept.items() if len(kept) == 1 or scope.has(name, BLOCKS)}
    if 2 * sum(map(tree.weight, called.values())) < sum(map(tree.weight, kept.values())):
        return [_half(blocks) for blocks in kept.values()]
    if not called:
        return []
    names = sorted(called, key=lambda name: scope.has(name, SINGLE))
    line = [item for name in names for item in called[name]]
    sure = (len(kept) == 1 < len(line)) or (
        len(kept) == len(called) and any(scope.has(name, DUAL, SINGLE) for name in names)
    )
    if len(names) > 1 and any(scope.has(name, ALTERNATING) for name in names):
        if len({len(called[name]) for name in names}) == 1:  # they take turns
            line, sure = [item for turn in zip(*called.values(), strict=True) for item in turn], False
    before = _before_a_skip(line)
    if before is not None:
        return Middle((before,), "the last block before a skip is joined", "medium", _names(line))
    where = " and ".join(f"`{name.rstrip('.') or 'the model'}`" for name in names)
    why = f"block {len(line) // 2} of {len(line)} in {where}"
    return Middle((_half(line),), why, "high" if sure else "medium", _names(line))


def _half(blocks: list[Item]) -> str:
    return tree.last(*blocks[len(blocks) // 2])


def _before_a_skip(blocks: list[Item]) -> str | None:
    """The last block before one that takes more channels than there were: in a U-Net kept as one flat list."""
    widths = [(name, *width) for name, block in blocks if (width := tree.channels(block)) is not None]
    if not widths or widths[-1][2] > widths[0][2]:
        return None
    return next((a[0] for a, b in pairwise(widths) if b[1] > a[2]), None)


def _stack(scope: _Scope) -> Middle | None:
    """The hidden layer in the middle of a plain stack of layers, each with the activation after it."""
    stacks: list[list[str]] = []
    for label, items in scope.lists.items():
        layers: list[str] = []
        for name, module in items:
            if not layers or any(p.ndim > 1 for p in module.parameters()):
                layers.append(name)
            else:
                layers[-1] = name
        if not scope.has(label, SIDE, TIME) and len(layers) > 2:
            stacks.append(layers[:-1])
    if len(stacks) != 1:
        return None
    (hidden,) = stacks
    half = len(hidden) // 2
    return Middle((hidden[half],), f"hidden layer {half} of {len(hidden)}", "medium", tuple(hidden))


def _single(scope: _Scope) -> Middle | None:
    """A single layer called middle."""
    mids = [name for name, _ in scope.children if scope.has(name, MIDDLE)]
    return Middle((mids[-1],), f"`{mids[-1]}` is called a middle", "high", tuple(mids)) if mids else None
