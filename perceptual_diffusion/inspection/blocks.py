"""A model's blocks in the order in which they run: what each gives, holds and costs, and whether it sees the noisy sample.

A block is what a person would list: the elements of module lists, and what stands beside them (`conv_in`, `mid_block`). A
module that holds most of the model, and its only large lists, is a wrapper or a stack: its parts are listed instead of it.

Nothing is computed on fake tensors, so a model of any size can be traced there:

    with FakeTensorMode(allow_non_fake_inputs=True):
        blocks = trace(model, lambda: model(sample, t), sample=sample)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from perceptual_diffusion import taps
from perceptual_diffusion._shapes import leaves
from perceptual_diffusion.inspection.flops import Flops, counting, quiet
from perceptual_diffusion.types import Sample

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of a model.

    Attributes:
        name: dotted name.
        kind: name of its class.
        shapes: shapes of the tensors it gives.
        parameters: how many it holds.
        parameters_share: of all parameters of the model, 0 to 1.
        flops: floating-point operations of its forward, multiplications and additions of matrix products and convolutions.
        flops_share: of all of the forward's, 0 to 1.
        flops_until: share of the forward's operations that have run when this block is done, 0 to 1.
        noisy: whether what it gives depends on the noisy sample; None where that was not asked.
    """

    name: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    parameters: int
    parameters_share: float
    flops: int
    flops_share: float
    flops_until: float
    noisy: bool | None


def trace(model: nn.Module, run: Callable[[], Any], *, sample: Sample | None = None) -> list[Block]:
    """Run a model once, in `eval()`, and give its blocks in execution order.

    Modes and `requires_grad` are afterwards as before.

    Args:
        model: the model, also inside DDP; of a compiled one pass the original.
        run: runs it; what it returns is ignored.
        sample: the noisy sample that `run` gives it, (B, *) or nested, without a graph of its own; None: which blocks
            depend on it is not asked.

    Returns:
        the blocks that hold parameters or cost something.

    Raises:
        ValueError: `run` runs no module of the model.
    """
    model = taps.unwrap(model)
    inputs = [leaf for leaf in leaves(sample) if leaf.is_floating_point()] if sample is not None else []
    counter = Flops()
    records: dict[nn.Module, _Record] = {}

    def enter(module: nn.Module, args: Any) -> None:
        records.setdefault(module, _Record(order=len(records))).started = counter.total

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        record, now = records[module], counter.total
        record.flops += now - record.started
        if record.shapes is None:
            given = list(_tensors(output))
            record.shapes, record.until = tuple(tuple(tensor.shape) for tensor in given), now
            record.noisy = any(tensor.requires_grad for tensor in given) if inputs else None

    handles: list[Any] = []
    for module in model.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with quiet(model, inputs), counting(counter, grad=bool(inputs), keep=False):
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not records:
        raise ValueError("`run` runs no module of `model`. Pass the model that it runs, not a compiled one.")
    total = max(1, counter.total)
    held = max(1, _parameters(model))
    units = sorted(_units(model, "", records, model), key=lambda unit: records[unit[1]].order)
    return [
        Block(
            name=name,
            kind=type(module).__name__,
            shapes=record.shapes or (),
            parameters=_parameters(module),
            parameters_share=_parameters(module) / held,
            flops=record.flops,
            flops_share=record.flops / total,
            flops_until=record.until / total,
            noisy=record.noisy,
        )
        for name, module in units
        if (record := records[module]).flops or _parameters(module)
    ]


@dataclass
class _Record:
    """What the hooks saw of one module; of one that runs several times, its first output and all its operations."""

    order: int
    started: int = 0
    until: int = 0
    flops: int = 0
    shapes: tuple[tuple[int, ...], ...] | None = None
    noisy: bool | None = None


def _units(
    module: nn.Module, path: str, records: dict[nn.Module, _Record], model: nn.Module
) -> Iterator[tuple[str, nn.Module]]:
    """The blocks below a module, with their dotted names."""
    ran = [(name, child) for name, child in module.named_children() if any(m in records for m in child.modules())]
    heavy = [child for _, child in ran if _repeats(child) and _share(child, records, model) > 0.2]
    listed = isinstance(module, CONTAINERS) and len(ran) > 1
    for name, child in ran:
        whole = child in records
        if whole and (listed or heavy != [child] or _share(child, records, model) < 0.5):
            yield f"{path}{name}", child
        else:
            yield from _units(child, f"{path}{name}.", records, model)


def _repeats(module: nn.Module) -> bool:
    """Whether a container in it holds several modules of one class with parameters."""
    for inner in module.modules():
        if isinstance(inner, CONTAINERS):
            kinds = [type(child) for child in inner.children() if any(True for _ in child.parameters())]
            if len(kinds) > len(set(kinds)):
                return True
    return False


def _share(child: nn.Module, records: dict[nn.Module, _Record], model: nn.Module) -> float:
    """Its share of the model's parameters or operations, whichever is larger."""
    whole = max(1, records[model].flops if model in records else 0)
    flops = sum(records[m].flops for m in ([child] if child in records else child.children()) if m in records)
    return max(_parameters(child) / max(1, _parameters(model)), flops / whole)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a module's output: those at its top level, else those inside its tuples."""
    if isinstance(output, Tensor):
        yield output
        return
    items = list(output.values()) if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    top = [item for item in items if isinstance(item, Tensor)]
    for item in top or items:
        yield from _tensors(item)
