"""What to log of a run: the parts of the loss, over bands of t, and the size of the teacher's features."""

from typing import Any

import torch
from torch import Tensor

from perceptual_diffusion._shapes import first, leaves, map_leaves
from perceptual_diffusion.objective import SelfPerceptualObjective
from perceptual_diffusion.renoising import mix_samples
from perceptual_diffusion.types import Cond, Sample


class Monitor:
    """Means of an objective's terms between two readings, over all times and over bands of t.

        monitor = Monitor(objective)
        loss = objective(model, clean, cond=cond)
        monitor.update()
        if step % 50 == 0:
            log(monitor.pop(), step)

    The bands hold equal shares of the schedule's ranks. Each process sees its own samples.

    Args:
        objective: whose last call is read.
        bands: into how many bands of t the terms are put; 0 for none.

    Raises:
        ValueError: `bands` is no whole number of at least 0.
    """

    def __init__(self, objective: SelfPerceptualObjective, bands: int = 4) -> None:
        if not (isinstance(bands, int) and not isinstance(bands, bool) and bands >= 0):
            raise ValueError(f"`bands` is {bands!r}, expected a whole number of at least 0.")
        self.objective, self.bands = objective, bands
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None

    def update(self) -> None:
        """Add the terms of the objective's last call; nothing is copied to the host.

        Raises:
            ValueError: the objective has not been called.
        """
        terms = self.objective.terms
        if not terms or "t" not in self.objective.times:
            raise ValueError("`objective` has no terms yet. Call `update` after the loss.")
        t, names = self.objective.times["t"], tuple(terms)
        values = torch.stack([torch.ones_like(terms[names[0]]), *terms.values()], 1)
        sums = values.new_zeros(max(1, self.bands), values.shape[1])
        sums.index_add_(0, self._band(t), values)
        if self._sums is None or self._names != names:
            self._names, self._sums = names, sums
        else:
            self._sums = self._sums.to(sums.device) + sums

    def pop(self) -> dict[str, float]:
        """Give the means since the last reading, and start anew.

        Returns:
            "sp" and "mse", the means of L_sp and L_mse before any weight; then of each band that had samples, as
            "sp/t 0 to 249". Empty if nothing was added.
        """
        if self._sums is None:
            return {}
        rows = self._sums.tolist()
        self._sums = None
        whole = [sum(column) for column in zip(*rows, strict=True)]
        if not whole[0]:  # of empty batches
            return {}
        found = {name: value / whole[0] for name, value in zip(self._names, whole[1:], strict=True)}
        for label, (count, *sums) in zip(self._labels() if self.bands else [], rows, strict=False):
            if count:
                found |= {f"{name}/t {label}": value / count for name, value in zip(self._names, sums, strict=True)}
        return found

    @torch.no_grad()
    def features(self, clean: Sample, *, cond: Cond | None = None) -> dict[str, float]:
        """Measure how large the teacher's features of noised data are, which shows layers that outweigh or are silent.

        The noise and the times are the same at every call. Where the teacher is sharded, every process must call.

        Args:
            clean: data, shape (B, *), or nested where the model's sample is.
            cond: the model's own keyword arguments.

        Returns:
            the root mean square of each layer's feature, as "features/mid_block".
        """
        objective, like = self.objective, first(clean)
        generator = torch.Generator(like.device).manual_seed(0)
        low, high = objective.schedule.drawn
        ranks = (torch.arange(len(like), dtype=torch.float64) + 0.5) / max(1, len(like))  # some devices have no float64
        t = objective.schedule.at(ranks)
        t = (t if t.dtype == torch.int64 else t.float()).clamp(low, high).to(like.device)
        noise = map_leaves(lambda x: torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator), clean)
        found: list[Any] = objective.teacher(mix_samples(clean, noise, objective.schedule(t)), t, dict(cond or {}))
        names = getattr(objective.teacher, "layers", range(len(found)))
        return {
            f"features/{name}": float(torch.stack([x.float().square().mean() for x in leaves(feature)]).mean().sqrt())
            for name, feature in zip(names, found, strict=True)
        }

    def _band(self, t: Tensor) -> Tensor:
        if not self.bands:
            return torch.zeros(len(t), dtype=torch.int64, device=t.device)
        return (self.objective.schedule.rank(t) * self.bands).long().clamp(0, self.bands - 1)

    def _labels(self) -> list[str]:
        schedule = self.objective.schedule
        low, high = schedule.drawn
        edges = schedule.at(torch.arange(self.bands + 1, dtype=torch.float64) / self.bands).clamp(low, high).tolist()
        whole = all(isinstance(edge, int) for edge in edges)
        last = [edge - 1 for edge in edges[1:-1]] + edges[-1:] if whole else edges[1:]
        return [f"{start:.4g} to {end:.4g}" for start, end in zip(edges[:-1], last, strict=True)]
