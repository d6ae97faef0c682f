"""A copy of a LoRA model's modules without the LoRA layers, which shares the base weights and follows what becomes of them."""

import copy
import logging
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from perceptual_diffusion import _peft, taps
from perceptual_diffusion.copies import copy_tree

logger = logging.getLogger("perceptual_diffusion")

TABLE = 2**16
"""Buffers of more elements are tables, of positions say, and are shared; smaller ones may be statistics and are copied."""


@dataclass
class _Pair:
    """A module of the student, as it was before PEFT, and the module of the alias in its place."""

    path: str
    source: nn.Module
    own: nn.Module
    trained: set[str] = field(default_factory=set)
    """Names of the weights that training changes in place, of which the alias holds copies for good."""


@dataclass
class _Tuned:
    """Layers of PEFT's around one module, outermost first, and the pairs of that module and its parts."""

    layers: tuple[Any, ...]
    pairs: list[_Pair]


class Alias:
    """A copy of a LoRA model's modules without the LoRA layers, which shares the base weights and follows what becomes of them.

    Copied is what training changes in place: weights that require grad, and buffers that may be statistics. Of a layer
    into which adapters are merged the alias holds an unmerged copy as long as they are.

    Args:
        model: the LoRA model, also inside DDP or torch.compile.

    Attributes:
        module: the copy; its checkpointing is off.

    Raises:
        ValueError: the model has no LoRA layers, an adapter altered the base when it was added, or the base is
            partitioned, offloaded, or cannot be copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._root = taps.unwrap(model)
        if not _peft.tuners(self._root):
            raise ValueError(
                f"`model` is a {type(self._root).__name__} without LoRA layers, expected those of PEFT's `get_peft_model` or of "
                "diffusers' `add_adapter`. Add the adapter before `wrap`, or use `teacher='copy'`."
            )
        base = list(_peft.walk_clean(self._root))
        weights = [p for _, module in base for p in module._parameters.values() if p is not None]
        trained = {id(p) for p in weights if p.requires_grad}
        self.module = copy_tree(self._root, _shared(base, trained), _peft.clean)
        for _, module in _peft.walk_clean(self.module):
            vars(module).pop("peft_config", None)
            if "support_avx512bf16_for_cpu" in vars(module):  # else bitsandbytes repacks the shared weight in eval mode
                vars(module)["support_avx512bf16_for_cpu"] = False
        self._pairs = [
            _Pair(path, source, own, {name for name, p in source._parameters.items() if id(p) in trained})
            for (path, source), (_, own) in zip(base, _peft.walk_clean(self.module), strict=True)
        ]
        self._tuned: list[_Tuned] = []
        self._index()
        self._find()
        self._check()

    def follow(self) -> None:
        """Look what has become of the base since the last pass, and follow it.

        Raises:
            ValueError: a shared weight is trained now, is no longer whole on this process, or an adapter altered it.
        """
        self._check()
        configs = _peft.configs(self._holders)
        if len(configs) != len(self._configs) or any(a is not b for a, b in zip(configs, self._configs, strict=True)):
            self._find()
            self._check()
        elif [bool(layer.merged_adapters) for layer in self._layers] != self._merged:
            self._merge()
            self._check()
        for own, theirs, name in self._owned:
            _move(own, name, theirs.get(name))
        for place, (own, theirs, name, version) in enumerate(self._buffers):
            buffer = theirs.get(name)
            if buffer is None or (buffer is own[name] and buffer._version == version):
                continue
            if buffer is own[name]:
                # DDP writes its own values into the buffers of every process but the first
                logger.info("the buffer %r of `model`, which the teacher shares, was written into", name)
            own[name] = buffer
            self._buffers[place] = own, theirs, name, buffer._version

    @property
    def weight(self) -> Tensor:
        """The first weight, which lies where the base does."""
        return next(self.module.parameters())

    @property
    def parameters_held(self) -> int:
        """How many parameters the alias holds besides the student's."""
        held = {id(p): p for own, _, name in self._owned if isinstance(p := own[name], nn.Parameter)}
        return sum(p.numel() for p in held.values())

    def _find(self) -> None:
        """Find the layers of PEFT's. Those removed since are kept: their adapters may have been merged before."""
        self._holders = [m for m in _peft.walk(self._root) if m is self._root or "peft_config" in vars(m)]
        _refuse_altered(_peft.configs(self._holders))
        places = {id(pair.source): pair for pair in self._pairs}
        known = {id(layer) for tuned in self._tuned for layer in tuned.layers}
        for layers in _peft.tuners(self._root):
            if id(layers[0]) in known:
                continue
            inside = [module for _, module in _peft.walk_clean(layers[0])]
            if any(id(module) not in places for module in inside):
                raise ValueError(
                    f"layers of `model` were replaced after `wrap`, and {type(inside[0]).__name__} under a new adapter is one of "
                    "them. Build the objective again, or use `teacher='copy'`."
                )
            self._tuned = [tuned for tuned in self._tuned if tuned.layers[0] not in layers]
            self._tuned.append(_Tuned(layers, [places[id(module)] for module in inside]))
            if any(map(_peft.is_volatile, layers)):
                _keep(self._tuned[-1])
        self._configs = _peft.configs(self._holders)
        self._layers = [layer for tuned in self._tuned for layer in tuned.layers]
        self._merge()

    def _merge(self) -> None:
        """Take unmerged copies of the layers that are merged now, and share the others."""
        for tuned in self._tuned:
            merged = any(layer.merged_adapters for layer in tuned.layers)
            base = _peft.unmerged(tuned.layers[0]) if merged else tuned.layers[0]
            for (_, given), pair in zip(_peft.walk_clean(base), tuned.pairs, strict=True):
                for name, parameter in given._parameters.items():
                    if name not in pair.trained:
                        pair.own._parameters[name] = parameter
        self._merged = [bool(layer.merged_adapters) for layer in self._layers]
        self._index()

    def _index(self) -> None:
        """List what is shared and what is the alias's own, for the look before each pass."""
        shared: list[tuple[dict[str, Any], str, Tensor, _Pair]] = []
        owned: list[tuple[dict[str, Any], dict[str, Any], str]] = []
        listed: list[tuple[dict[str, Any], dict[str, Any], str, int]] = []
        for pair in self._pairs:
            own, theirs = pair.own._parameters, pair.source._parameters
            for name, parameter in own.items():
                if parameter is not None and parameter is theirs.get(name):
                    shared.append((theirs, name, parameter, pair))
                elif parameter is not None:
                    owned.append((own, theirs, name))
            mine, buffers = pair.own._buffers, pair.source._buffers
            for name, buffer in mine.items():
                if buffer is not None and buffer is buffers.get(name):
                    listed.append((mine, buffers, name, buffer._version))
                elif buffer is not None:
                    owned.append((mine, buffers, name))
        self._shared, self._owned, self._buffers = shared, owned, listed

    def _check(self) -> None:
        """Refuse shared weights that are trained now or no longer whole, and take those that were replaced."""
        stale = [at for at in self._shared if at[0].get(at[1]) is not at[2] or at[2].requires_grad]
        # FSDP puts other tensors there; ZeRO-3 changes each of those that are there
        for theirs, name, shared, pair in stale or self._shared[:1]:
            path, now = f"{pair.path}.{name}".lstrip("."), theirs.get(name)
            if now is None or taps.partitioned(now) or now.shape != shared.shape:
                raise ValueError(
                    f"{path!r} of `model` was partitioned or replaced after `wrap`, and `teacher='lora'` shares it. Use `teacher='copy'` "
                    "where FSDP or DeepSpeed partitions the base."
                )
            _refuse_meta(path, now)
            if now.requires_grad:
                raise ValueError(
                    f"{path!r} of `model` requires grad now, and the teacher that shares it would move with it. Freeze it, or call "
                    "`wrap` after `requires_grad_(True)`: weights that train then are copied."
                )
            pair.own._parameters[name] = now
        if stale:
            logger.warning(
                "%d base weights of `model` were replaced after `wrap`; the teacher runs the new ones", len(stale)
            )
            self._index()


def _shared(base: list[tuple[str, nn.Module]], trained: set[int]) -> dict[int, Any]:
    """What a copy shares with its original, as a memo for `copy.deepcopy`."""
    memo: dict[int, Any] = {}
    for _, module in base:
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if id(parameter) in trained:
                memo[id(parameter)] = copy.deepcopy(parameter).requires_grad_(False)
                continue
            memo |= {id(value): value for value in vars(parameter).values() if not isinstance(value, nn.Module)}
            memo[id(parameter)] = parameter
        memo |= {id(b): b for b in module._buffers.values() if b is not None and b.numel() > TABLE}
        # what bitsandbytes' 8-bit layers move their weight into
        memo |= {id(value): value for value in vars(module).values() if type(value).__name__ == "MatmulLtState"}
    return memo


def _keep(tuned: _Tuned) -> None:
    """Copy the weights of a base that PEFT makes anew in every pass."""
    for (_, given), pair in zip(_peft.walk_clean(_peft.unmerged(tuned.layers[0])), tuned.pairs, strict=True):
        pair.own._parameters.update(given.requires_grad_(False)._parameters)
        for name in given._parameters:
            vars(pair.own).pop(name, None)  # while merged, it is no parameter
            pair.trained.add(name)


def _move(own: dict[str, Any], name: str, theirs: Any) -> None:
    """Bring a copy where the student's tensor is, and to its dtype."""
    mine = own[name]
    if theirs is None or theirs.is_meta or (mine.device == theirs.device and mine.dtype == theirs.dtype):
        return
    moved = mine.detach().to(theirs.device, theirs.dtype)
    own[name] = nn.Parameter(moved, requires_grad=False) if isinstance(mine, nn.Parameter) else moved


def _refuse_meta(path: str, parameter: Tensor) -> None:
    if parameter.is_meta:
        raise ValueError(
            f"{path.lstrip('.')!r} of `model` is on the meta device, as offloading leaves it, and `teacher='lora'` runs the weights where "
            "they are. Keep the model on one device, or use `teacher='copy'` before it is offloaded."
        )


def _refuse_altered(configs: list[Any]) -> None:
    for kind in filter(None, map(_peft.altering, configs)):
        raise ValueError(
            f"an adapter of `model` was initialised by {kind!r}, which alters the base weights, so that they are no longer the model "
            "before training. Use `teacher='copy'`, and call `wrap` before the adapter is added."
        )
