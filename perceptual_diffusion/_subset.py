"""Making a step again of some of its samples: the batch without the others, and the student as it was before."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from perceptual_diffusion import staged, taps
from perceptual_diffusion._restore import Kept
from perceptual_diffusion._shapes import (
    OWN_SEED,
    WAYS,
    _like,
    compute_dtype,
    first,
    join,
    leaves,
    map_leaves,
    map_tensors,
    take,
    take_cond,
)
from perceptual_diffusion.types import Cond, Sample, Teacher

Look = Callable[["Batch", list[int]], list[tuple[Tensor, Tensor]]]
"""Shows what a model makes of the samples of a batch at some places, and how far rounding may take each of it."""
PRODUCTS = 8
"""Of so many random numbers with parts of a gradient is made what is compared of it."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step is made of.

    Attributes:
        rows: the index of each sample in the whole batch.
        clean: x_0, shape (B, *) or nested.
        noise: ε, likewise.
        t: times, shape (B,).
        t_prime: the second times, shape (B,).
        cond: the model's conditions.
        x_t: what the model saw, if it was not alpha_t clean + sigma_t noise.
        importance: what the drawing of t' weighs the samples by, shape (B,); None for 1.
    """

    rows: list[int]
    clean: Sample
    noise: Sample
    t: Tensor
    t_prime: Tensor
    cond: Cond
    x_t: Sample | None = None
    importance: Tensor | None = None

    def without(self, left_out: Iterable[int], looks: list[Look]) -> "Batch":
        """Give the batch without the samples at these places. Without all of them, samples and conditions stay.

        Args:
            left_out: the places.
            looks: how the models that are given the conditions read them.

        Raises:
            ValueError: which conditions are whose cannot be found out.
        """
        keep = sorted({*range(len(self.rows))}.difference(left_out))
        if not keep:
            return replace(self, rows=[], t=self.t[:0], t_prime=self.t_prime[:0])
        return self._of(keep, self._way(keep, looks))

    def _of(self, places: list[int], way: str) -> "Batch":
        parts = runs(places)
        conds = [take_cond(self.cond, len(self.rows), part, way) for part in parts]
        return replace(
            self,
            rows=[self.rows[i] for i in places],
            clean=pick(self.clean, parts),
            noise=pick(self.noise, parts),
            t=torch.cat([self.t[part] for part in parts]),
            t_prime=torch.cat([self.t_prime[part] for part in parts]),
            cond=_together(conds, self.cond),
            x_t=None if self.x_t is None else pick(self.x_t, parts),
            importance=None if self.importance is None else torch.cat([self.importance[part] for part in parts]),
        )

    def _way(self, keep: list[int], looks: list[Look]) -> str:
        """Where the samples lie in the conditions: so that the models make the same of those kept, beside the others and without."""
        if not _may_be_split(self.cond):
            return WAYS[0]
        device = first(self.clean).device
        generator = torch.Generator(device).manual_seed(OWN_SEED)
        # in place of the samples, whose NaN would hide what differs
        drawn = replace(
            self, clean=standard_normal(self.clean, generator), cond=map_tensors(_without_nan, dict(self.cond))
        )
        before = Kept(None, device)
        try:
            with staged._Uncached():
                beside = [shown for look in looks for shown in look(drawn, keep)]
                for way in WAYS:
                    if _same(beside, drawn, keep, way, looks):
                        return way
        finally:
            before.restore()
        raise ValueError(
            "`nonfinite` is 'skip', but samples cannot be left out: they lie in no dimension of their own in a condition, or "
            "depend on each other. Wrap with `nonfinite='raise'`, and mend the data."
        )


def _same(beside: list[tuple[Tensor, Tensor]], whole: Batch, keep: list[int], way: str, looks: list[Look]) -> bool:
    try:
        part = whole._of(keep, way)
        alone = [shown for look in looks for shown, _ in look(part, [*range(len(keep))])]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the model's own, of conditions that are split wrongly
        return False
    return len(alone) == len(beside) and all(
        one.shape == other.shape and bool(_size(one - other) <= far)
        for (one, far), other in zip(beside, alone, strict=True)
    )


def _size(x: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(x, dtype=compute_dtype(x))
    return size


def _rounding(tensors: Iterable[Tensor], device: torch.device) -> float:
    """How far, relatively, other kernels may take what is made of these."""
    dtypes = {x.dtype for x in tensors}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return max(staged.APART.get(dtype, 1e-3) for dtype in dtypes)


def features_of(teacher: Teacher) -> Look:
    """How a teacher reads conditions: by its features."""

    def look(batch: Batch, places: list[int]) -> list[tuple[Tensor, Tensor]]:
        with torch.no_grad():
            features = teacher(batch.clean, batch.t_prime, batch.cond)
        # also of B k frames
        of_each = [f.reshape(len(batch.rows), -1) if isinstance(f, Tensor) else f for f in features]
        shown = [leaf for f in of_each for leaf in leaves(pick(cast(Sample, f), runs(places)))]
        apart = _rounding([*shown, *leaves(batch.clean)], batch.t.device)
        return [(feature, apart * _size(feature)) for feature in shown]

    return look


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


def standard_normal(like: Sample, generator: torch.Generator) -> Sample:
    """Draw a sample of unit variance."""
    return map_leaves(lambda x: torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator), like)


def _without_nan(x: Tensor) -> Tensor:
    """Cut off from its graph, and finite but for the infinities of a mask."""
    return x.detach().nan_to_num(0, 0, -torch.inf) if x.is_floating_point() else x


def _may_be_split(cond: Any) -> bool:
    if isinstance(cond, Mapping | tuple):
        return any(map(_may_be_split, cond.values() if isinstance(cond, Mapping) else cond))
    return cond.ndim > 0 if isinstance(cond, Tensor) else isinstance(cond, list)


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
        return _like(whole, [_together(list(column), item) for *column, item in zip(*parts, whole, strict=True)])
    return whole


# --- the student ------------------------------------------------------------------------------------------------------


def is_sharded(module: Any) -> bool:
    """Whether the passes of a module wait for other processes: under FSDP, ZeRO-3, tensor parallelism, or SyncBatchNorm."""
    if not isinstance(module, nn.Module):
        return False
    synced = taps.several_processes() and any(isinstance(part, nn.SyncBatchNorm) for part in module.modules())
    return synced or taps.gathered(module)


def check_alone(name: str, model: Any) -> None:
    """Raise a ValueError where a second pass of a model on one process would wait for the others."""
    if not isinstance(model, nn.Module):
        return
    alone = _without_ddp(model)
    if alone is None or is_sharded(alone) or any(isinstance(x, DistributedDataParallel) for x in alone.modules()):
        raise ValueError(
            f"`nonfinite` is 'skip', but a second pass of the {name} on one process would wait for the others: it is sharded (FSDP, "
            "ZeRO), has a SyncBatchNorm, or DDP inside of it, or DDP has `static_graph`, `mixed_precision` or "
            "`find_unused_parameters`. Wrap with `nonfinite='raise'`."
        )


class Student:
    """A student before a pass, to be run again as if that pass had not been, and without DDP: no other process makes a second one.

    Args:
        model: the student, also inside DDP or torch.compile.
        run: runs it: `(model, x_t, t, cond) -> prediction`.
        device: where it runs.

    Raises:
        TypeError: it is no module.
        ValueError: its passes wait for other processes.
    """

    def __init__(self, model: Any, run: Callable[[Any, Sample, Tensor, Cond], Sample], device: torch.device) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"`model` is a {type(model).__name__}, expected a torch.nn.Module: `nonfinite` is 'skip', which puts its buffers "
                "back. Pass the module itself, or wrap with `nonfinite='raise'`."
            )
        check_alone("student", model)
        self.model: nn.Module = _without_ddp(model)
        self.run, self.before = run, Kept(model, device)

    def again(self, x_t: Sample, t: Tensor, cond: Cond) -> Sample:
        """Predict once more."""
        self.before.restore()
        return self.run(self.model, x_t, t, cond)

    def look(self, batch: Batch, places: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Show how it reads conditions: by its prediction in eval mode, and by the gradient, in which also what has no effect yet shows."""
        modes = [(part, part.training) for part in self.model.modules()]
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        try:
            for part, _ in modes:
                part.training = False
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                predicted = self.again(batch.clean, batch.t, batch.cond)
                shown, given = ([*leaves(pick(x, runs(places)))] for x in (predicted, batch.clean))
                errors = (one.to(compute_dtype(one)) - other for one, other in zip(shown, given, strict=True))
                value = torch.stack([error.square().sum() for error in errors]).sum()
                found = gradients(value, weights, keep=False) if value.requires_grad else ()
        finally:
            for part, mode in modes:
                part.training = mode
        apart = _rounding([*shown, *given, *weights], value.device)
        products = [_products(gradient, OWN_SEED + i).to(value) for i, gradient in enumerate(found)]
        total = _size(torch.stack([value.detach().new_zeros(PRODUCTS), *products]))
        # some gradients are nothing but rounding, as that of a key's bias
        of_gradients = [(x, apart * _size(x).clamp(min=10 * apart * total)) for x in products]
        return [(x.detach(), apart * _size(x.detach())) for x in shown] + of_gradients

    def weights(self) -> list[nn.Parameter]:
        """Give the weights, with the student as it was before.

        Raises:
            ValueError: one is not finite.
        """
        self.before.restore()
        weights = list(self.model.parameters())
        if not all(bool(weight.isfinite().all()) for weight in weights if weight.is_floating_point()):
            raise ValueError(
                "the weights of `model` are not finite. Go back to an earlier state, and train more slowly."
            )
        return weights


def gradients(values: Tensor, wanted: Sequence[Tensor], *, keep: bool) -> tuple[Tensor, ...]:
    """Give the gradient of the sum of values.

    Args:
        values: what is summed.
        wanted: with respect to what.
        keep: whether the graph stays.

    Raises:
        ValueError: a part is checkpointed so that it gives none.
    """
    with torch.autocast(values.device.type, enabled=False):
        try:
            return torch.autograd.grad(values.sum(), wanted, retain_graph=keep, materialize_grads=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise ValueError(
                "`nonfinite` looks at each sample's gradient, which a model that checkpoints with `use_reentrant=True` does not "
                "give. Use `use_reentrant=False`, or wrap with `nonfinite='propagate'`."
            ) from error


def _products(gradient: Tensor, seed: int) -> Tensor:
    """A few numbers in which any change of a gradient shows, so that no two copies of all gradients lie side by side."""
    generator = torch.Generator(gradient.device).manual_seed(seed)
    products = gradient * cast(Tensor, standard_normal(gradient, generator))
    return torch.stack([part.sum(dtype=compute_dtype(part)) for part in products.flatten().tensor_split(PRODUCTS)])


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
    # what no pass uses is settled by the first one, and the second may use less
    fixed = inside.static_graph or inside.find_unused_parameters or inside.mixed_precision is not None
    return None if fixed else inside.module
