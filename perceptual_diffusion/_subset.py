"""Making a step again of some of its samples: the batch without the others, and the student as it was before."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from perceptual_diffusion import staged
from perceptual_diffusion._shapes import WAYS, join, map_leaves, map_tensors, take, take_cond, tensors_in
from perceptual_diffusion.types import Cond, Sample, Teacher

SHARDED = {"FSDPModule", "FullyShardedDataParallel", "DeepSpeedEngine"}
"""Classes whose passes, or what is kept for them, wait for other processes."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step is made of.

    Attributes:
        rows: the index of each sample in the whole batch.
        clean: x_0, shape (B, *) or nested.
        noise: ε, likewise.
        t: times, shape (B,).
        cond: the model's conditions.
        t_prime: the second times, shape (B,).
        x_t: what the model saw, if it was not alpha_t clean + sigma_t noise.
        importance: what the drawing of t' weighs the samples by, shape (B,); None for 1.
    """

    rows: list[int]
    clean: Sample
    noise: Sample
    t: Tensor
    cond: Cond
    t_prime: Tensor
    x_t: Sample | None = None
    importance: Tensor | None = None

    def without(self, left_out: set[int], teacher: Teacher, x_tt: Sample) -> "Batch":
        """Give the batch without the samples of these indices; `x_tt` is the true pair at t'. Without all of them, only `rows` is empty.

        Raises:
            ValueError: which conditions are whose cannot be found out.
        """
        batch = len(self.rows)
        keep = [i for i in range(batch) if i not in left_out]
        if not keep:
            return replace(self, rows=[])
        parts, way = runs(keep), self._way(left_out, teacher, x_tt)
        return replace(
            self,
            rows=[self.rows[i] for i in keep],
            clean=pick(self.clean, parts),
            noise=pick(self.noise, parts),
            t=torch.cat([self.t[part] for part in parts]),
            t_prime=torch.cat([self.t_prime[part] for part in parts]),
            cond=_together([take_cond(self.cond, batch, part, way) for part in parts], self.cond),
            x_t=None if self.x_t is None else pick(self.x_t, parts),
            importance=None if self.importance is None else torch.cat([self.importance[part] for part in parts]),
        )

    def _way(self, left_out: set[int], teacher: Teacher, x_tt: Sample) -> str:
        """Where the samples lie in the conditions, found as where a batch is split: by the teacher's features."""
        if next(tensors_in(self.cond), None) is None:
            return WAYS[0]
        keep = [i for i in range(len(self.rows)) if i not in left_out]
        parts = sorted(runs(keep) + runs(sorted(left_out)), key=lambda part: part.start)
        # a NaN that reaches other samples' features would hide what differs
        x_tt = map_leaves(lambda x: x.nan_to_num(0, 0, 0), x_tt)
        cond = map_tensors(lambda x: torch.where(x.isnan(), 0, x) if x.is_floating_point() else x, dict(self.cond))
        way = staged.MicroBatches("auto")._way(teacher, x_tt, self.t_prime, cond, parts)
        if way is None:
            raise ValueError(
                "`nonfinite` is 'skip', but samples cannot be left out: they lie in no dimension of their own in a condition, or "
                "depend on each other. Wrap with `nonfinite='raise'`, and mend the data."
            )
        return way


def runs(rows: list[int]) -> list[slice]:
    """The runs of neighbours in a rising list of indices."""
    parts: list[slice] = []
    for row in rows:
        if parts and parts[-1].stop == row:
            parts[-1] = slice(parts[-1].start, row + 1)
        else:
            parts.append(slice(row, row + 1))
    return parts


def pick(sample: Sample, parts: list[slice]) -> Sample:
    """Some of the samples of a batch, (B, *) or nested, with their graph."""
    return join([take(sample, part) for part in parts])


def _together(parts: list[Any], whole: Any) -> Any:
    """The parts of a condition in one; what all samples share stays what it is."""
    if isinstance(whole, Tensor):
        dim = next((d for d, n in enumerate(whole.shape) if parts[0].shape[d] != n), None)
        return whole if dim is None else torch.cat(parts, dim)
    if isinstance(whole, Mapping):
        return {key: _together([part[key] for part in parts], value) for key, value in whole.items()}
    if isinstance(whole, list) and len(parts[0]) != len(whole):  # of B things
        return [item for part in parts for item in part]
    if isinstance(whole, list | tuple):
        items = [_together(list(column), item) for *column, item in zip(*parts, whole, strict=True)]
        return type(whole)(*items) if hasattr(whole, "_fields") else type(whole)(items)
    return whole


# --- the student ------------------------------------------------------------------------------------------------------


def is_sharded(module: Any) -> bool:
    """Whether the passes of a module wait for other processes: under FSDP, ZeRO, tensor parallelism, or SyncBatchNorm."""
    if not isinstance(module, nn.Module):
        return False
    names = {kind.__name__ for part in module.modules() for kind in type(part).__mro__}
    marked = any(hasattr(p, "ds_id") or type(p).__name__ == "DTensor" for p in module.parameters())
    return marked or bool(names & SHARDED) or ("SyncBatchNorm" in names and _processes() > 1)


def _processes() -> int:
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if several else 1


def check_alone(name: str, model: Any) -> None:
    """Raise a ValueError where a second pass of a model on one process would wait for the others."""
    if is_sharded(model) or (isinstance(model, nn.Module) and _without_ddp(model) is None):
        raise ValueError(
            f"`nonfinite` is 'skip', but a second pass of the {name} on one process would wait for the others: it is sharded (FSDP, "
            "ZeRO), has a SyncBatchNorm, or DDP has `static_graph` or `mixed_precision`. Wrap with `nonfinite='raise'`."
        )


class Student:
    """A student before a pass, to be run again as if that pass had not been.

    Its buffers are kept, since a norm of batches changes them, and the state of the generator that dropout draws from.

    Args:
        model: the student, also inside DDP or torch.compile.
        device: where it runs.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.buffers = [(b, b.clone()) for b in model.buffers()] if isinstance(model, nn.Module) else []
        modules = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
        self.states = [(module.set_rng_state, module.get_rng_state()) for module in modules]

    def rewound(self) -> Any:
        """Give the model as it was before the pass, without DDP: the other processes make no second pass."""
        with torch.no_grad():
            for buffer, before in self.buffers:
                buffer.copy_(before)
        for restore, state in self.states:
            restore(state)
        return _without_ddp(self.model)

    def weights(self) -> list[nn.Parameter]:
        """Give the weights.

        Raises:
            ValueError: one is not finite.
        """
        weights = list(self.model.parameters()) if isinstance(self.model, nn.Module) else []
        if not all(bool(weight.isfinite().all()) for weight in weights if weight.is_floating_point()):
            raise ValueError(
                "the weights of `model` are not finite. Go back to an earlier state, and train more slowly."
            )
        return weights


def nothing(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Give 0, with a gradient of 0 to each of the tensors that take one, whatever they hold; DDP waits for all weights."""
    zero = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
    return zero + sum(x.reshape(-1)[:0].sum().to(device, zero.dtype) for x in tensors if x.requires_grad)


def _without_ddp(model: Any) -> Any:
    """The model inside DDP, or the model; None where what DDP does in a pass cannot be left out."""
    inside = model
    while type(inside).__name__ == "OptimizedModule":
        inside = inside._orig_mod
    if not isinstance(inside, DistributedDataParallel):
        return model
    return None if inside.static_graph or inside.mixed_precision is not None else inside.module
