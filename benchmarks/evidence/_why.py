"""What is measured to find out why: spectra, errors split by spatial frequency, what a teacher sees of them, gradients.

Pictures are (N, C, H, W). A spatial frequency is counted in cycles per picture: 0 is the mean of a channel, H / 2 a period of 2.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from _bases import Base
from _data import load
from _sampling import sample, trajectory
from torch import Tensor, nn

from perceptual_diffusion import SelfPerceptualObjective, distances, timesteps
from perceptual_diffusion.cli import datasets
from perceptual_diffusion.parameterizations import System, recover
from perceptual_diffusion.schedules import Schedule

TIMES = 10
"""Bands of t."""
PERIODS = (2, 4, 8)
"""Of the model's grid, in pixels: the patches it is given, and those halved once and twice."""
RANKS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Where the teacher is looked at: ranks of t'."""
SIZE = 0.1
"""Root mean square of the changes it is shown."""
EDGES = (0.5, 2.0, 4.0, 8.0, 16.0)
"""Where bands of spatial frequency end, of pictures of 32 pixels."""
BANDS = ("mean", "1 to 2", "3 to 4", "5 to 8", "9 to 16", "above 16")
"""Their names; beyond 16 there are only diagonals."""
STEPS, GUIDANCE, SHOWN = 25, 3.0, 9
"""Steps of the sampler, the scale of guidance, and how many x̂_0 of a trajectory are shown."""
GUIDED = f", guidance {GUIDANCE:g}"
SECOND: dict[str, str | timesteps.Shifted] = {
    "uniform": "uniform", "N(t, 100)": "near", "t ± 100": timesteps.Shifted(by=100), "t ± 40": "shifted",
    "t ± 10": timesteps.Shifted(by=10),
}  # fmt: skip
"""Ways to draw t'."""
DRAWS, DRAWN_FROM, ANCESTRAL = 16, 25, 20
"""Of what is left of a gradient: samples of each x_t, so many x_t in a band for 1000 pictures, and steps of their sampler."""
Found = dict[str, Any]


# --- pictures -------------------------------------------------------------------------------------------------------------


def pixels(sample: Tensor) -> Tensor:
    """Give the pixels of a model's sample, (N, 4 C, h, w) to (N, C, 2 h, 2 w), neither clamped nor rounded."""
    return nn.functional.pixel_shuffle(sample.float(), 2)


def radius(like: Tensor) -> Tensor:
    """Give the spatial frequency of each place of a Fourier transform, shape (H, W)."""
    rows, columns = (torch.fft.fftfreq(size, 1 / size, device=like.device) for size in like.shape[-2:])
    return torch.hypot(rows[:, None], columns[None])


def power(images: Tensor) -> Tensor:
    """Give the power spectrum, shape (N, H, W), averaged over channels; it sums to the mean square of a picture."""
    return (torch.fft.fft2(images.float(), norm="forward").abs().square()).mean(1)


def rings(spectrum: Tensor) -> Tensor:
    """Average a power spectrum (..., H, W) over rings of whole frequency 0, 1, ... to the corner, shape (..., R)."""
    ring = radius(spectrum).round().long().flatten()
    total = torch.zeros(*spectrum.shape[:-2], int(ring.max()) + 1, device=spectrum.device)
    return total.index_add(-1, ring, spectrum.flatten(-2)) / ring.bincount()


def by_band(spectrum: Tensor) -> Tensor:
    """Sum a power spectrum (..., H, W) over each band of `BANDS`, shape (..., 6)."""
    band = torch.bucketize(radius(spectrum), torch.tensor(EDGES, device=spectrum.device)).flatten()
    total = torch.zeros(*spectrum.shape[:-2], len(BANDS), device=spectrum.device)
    return total.index_add(-1, band, spectrum.flatten(-2))


def split(images: Tensor) -> Tensor:
    """Split pictures by bands of frequency: parts that sum to them, shape (6, N, C, H, W)."""
    band = torch.bucketize(radius(images), torch.tensor(EDGES, device=images.device))
    transform = torch.fft.fft2(images.float())
    return torch.stack([torch.fft.ifft2(transform * (band == k)).real for k in range(len(BANDS))])


def grid(spectrum: Tensor, period: int) -> float:
    """Tell a grid of a period of 2, 4 or 8 pixels: how much its frequencies stand out in a mean power spectrum (H, W).

    They are the multiples of 1 / period along both axes, without those of half the period; at each, the power is divided by
    the mean of that one place nearer and farther along each axis that it has a part in. White noise gives 1.

    Returns:
        the geometric mean over the frequencies.
    """
    size = spectrum.shape[-1]
    step = size // period
    places = [(i, j) for i in range(0, size, step) for j in range(0, size, step) if i % (2 * step) or j % (2 * step)]
    logs = []
    for i, j in places:
        beside = [spectrum[(i + k) % size, j] for k in (-1, 1) if i] + [
            spectrum[i, (j + k) % size] for k in (-1, 1) if j
        ]
        logs.append((spectrum[i, j] / torch.stack(beside).mean()).log())
    return float(torch.stack(logs).mean().exp())


# --- predictions ----------------------------------------------------------------------------------------------------------


def times(schedule: Schedule, bands: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw times evenly within each of `bands` bands, shape (bands, n), the first band the cleanest."""
    rank = (torch.arange(bands)[:, None] + torch.rand(bands, n, generator=generator, dtype=torch.float64)) / bands
    t = schedule.at(rank.flatten()).reshape(bands, n)
    return t if t.dtype == torch.long else t.float()


def clean_hat(objective: SelfPerceptualObjective, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
    """Give x̂_0 of a prediction (eq. 8), shape (B, C, H, W)."""
    return recover(x_t, output, System.of(objective.schedule, objective.prediction, t))[0].float()


@torch.no_grad()
def errors(
    objective: SelfPerceptualObjective, model: nn.Module, clean: Tensor, cond: Mapping[str, Any], noise: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Give the error of the model's prediction and that of the x̂_0 it means, shape (B, C, H, W) each."""
    x_t = objective.add_noise(clean, noise, t)
    output = objective.output(objective.call(model, x_t, t, cond), clean)
    system = System.of(objective.schedule, objective.prediction, t)
    error = output - objective.target(clean, noise, t)
    return error, (-system.sigma / system.determinant).float()[:, None, None, None] * error


@torch.no_grad()
def seen(teacher: Callable[[Tensor], Sequence[Tensor]], x: Tensor, changes: Tensor, size: float) -> Tensor:
    """Give what a teacher sees of changes of its input: mean squared change of its features per mean squared change.

    Args:
        teacher: gives features, a list of (B, *); their distances are summed, as the objective sums them.
        x: its input, shape (B, C, H, W).
        changes: directions of change, shape (K, B, C, H, W).
        size: the root mean square they are brought to.

    Returns:
        one value per change and sample, shape (K, B).
    """
    still, found = teacher(x), []
    for change in changes:
        moved = teacher(x + size * change / change.square().mean((1, 2, 3), keepdim=True).sqrt())
        found.append(sum(distances.mse(a, b) for a, b in zip(moved, still, strict=True)) / size**2)
    return torch.stack(found)


# --- gradients ------------------------------------------------------------------------------------------------------------


def gradients(
    objective: SelfPerceptualObjective, model: nn.Module, clean: Tensor, cond: Mapping[str, Any], noise: Tensor, t: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Give the gradients of the objective's loss and of MSE, summed over the batch.

    Args:
        objective: the objective, which draws t'.
        model: the student.
        clean: x_0, shape (B, C, H, W).
        cond: the model's keyword arguments.
        noise: ε, likewise.
        t: times, shape (B,).
        generator: draws t'.

    Returns:
        those with respect to the prediction, shape (2, B, C, H, W), and to all weights, shape (2, P).
    """
    output = objective.output(objective.call(model, objective.add_noise(clean, noise, t), t, cond), clean)
    leaf = output.detach().requires_grad_()
    given = {"clean": clean, "noise": noise, "t": t, "cond": cond, "generator": generator}
    losses = objective.loss(leaf, **given, reduction="none"), distances.mse(leaf, objective.target(clean, noise, t))
    to_prediction = [torch.autograd.grad(loss.sum(), leaf)[0] for loss in losses]
    weights = [p for p in model.parameters() if p.requires_grad]
    to_weights = [
        torch.autograd.grad(output, weights, gradient, retain_graph=True, materialize_grads=True)
        for gradient in to_prediction
    ]
    return torch.stack(to_prediction), torch.stack([torch.cat([g.flatten() for g in grads]) for grads in to_weights])


def cosine(one: Tensor, other: Tensor) -> float:
    """Give the cosine of two vectors."""
    return float(nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


# --- where the two losses have their minimum ------------------------------------------------------------------------------


@torch.no_grad()
def origins(
    objective: SelfPerceptualObjective, model: nn.Module, x_t: Tensor, t: Tensor, cond: Mapping[str, Any], steps: int,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Draw x_0 that a model takes for the origins of x_t: ancestral sampling from t on, shape (B, C, H, W).

    A step to an earlier s draws q(x_s | x_t, x̂_0) (arXiv 2006.11239, eq. 6, of any alpha and sigma).
    """
    schedule, x = objective.schedule, x_t.double()
    ranks = schedule.rank(t)[None] * torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=t.device)[1:, None]
    if schedule.noise_first:
        raise ValueError("a schedule that starts with the noise is not known here.")
    for rank in ranks:
        output = objective.output(objective.call(model, x.to(x_t.dtype), t, cond), x_t)
        clean, noise = (part.double() for part in recover(x, output, System.of(schedule, objective.prediction, t)))
        s = schedule.at(rank)
        s = s if s.dtype == torch.long else s.float()
        alpha, sigma, alpha_s, sigma_s = (c.double()[:, None, None, None] for time in (t, s) for c in schedule(time))
        kept = ((alpha / alpha_s) * (sigma_s / sigma) ** 2 * sigma).clamp(max=sigma_s)
        fresh = (sigma_s.square() - kept.square()).sqrt()
        x = alpha_s * clean + kept * noise + fresh * torch.randn(x.shape, generator=generator).to(x)
        t = s
    return clean.to(x_t.dtype)


def left(
    objective: SelfPerceptualObjective,
    clean: Tensor,
    noise: Tensor,
    t: Tensor,
    t_prime: Tensor,
    cond: Mapping[str, Any],
) -> Tensor:
    """Give how much of L_sp's gradient is left where MSE has its minimum: |mean g|² / mean |g|², of each x_t, shape (B,).

    The minimum of MSE at an x_t is the mean of the targets of all origins that it can have: there its gradients cancel. Those of
    L_sp cancel too (0) if the teacher weighs errors by x_t alone, and pull away from it (up to 1) if by the origin also.

    Args:
        objective: of L_sp alone.
        clean: origins of each x_t, shape (B, K, C, H, W).
        noise: the noise that makes x_t of each, likewise.
        t: times, shape (B,).
        t_prime: second times, shape (B,); all origins of an x_t share one.
        cond: the model's keyword arguments, of B samples each.
    """
    count = clean.shape[1]
    many = lambda x: x.repeat_interleave(count, 0)  # noqa: E731
    x_0, epsilon = clean.flatten(0, 1), noise.flatten(0, 1)
    target = objective.target(x_0, epsilon, many(t)).unflatten(0, (-1, count))
    mean = target[:, :1] + (target - target[:, :1]).mean(1, keepdim=True)  # of equal ones exactly theirs
    best = mean.expand_as(target).flatten(0, 1).detach().requires_grad_()
    given = {"t": many(t), "t_prime": many(t_prime), "cond": {k: many(v) for k, v in cond.items()}}
    losses = objective.loss(best, clean=x_0, noise=epsilon, **given, reduction="none")
    gradient = torch.autograd.grad(losses.sum(), best)[0].double().unflatten(0, (-1, count)).flatten(2)
    return gradient.mean(1).square().sum(1) / gradient.square().sum(2).mean(1)


# --- all of it ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Study:
    """Models to be compared, and what is measured on them.

    Attributes:
        base: what they are variants of.
        models: by their names, in eval mode.
        objective: its teacher is a copy of the base.
        n: how many pictures everything is measured on.
        seed: of noise and times.
        device: where.
    """

    base: Base
    models: dict[str, nn.Module]
    objective: SelfPerceptualObjective
    n: int
    seed: int
    device: str

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(30_000 + self.seed)

    def ways(self) -> Iterator[tuple[str, nn.Module, float]]:
        """The models and their scales of guidance; the first also with guidance, if it knows classes."""
        for place, (name, model) in enumerate(self.models.items()):
            yield name, model, 1.0
            if self.base.conditional and not place:
                yield f"{name}{GUIDED}", model, GUIDANCE

    def start(self, n: int) -> tuple[Tensor, Tensor]:
        """Noise at the end of the schedule, and the classes in turn."""
        noise = torch.randn(n, *self.base.shape, generator=self.generator())
        return noise.to(self.device), self.labels(torch.arange(n) % self.base.null)

    def labels(self, asked: Tensor) -> Tensor:
        return (asked if self.base.conditional else torch.full_like(asked, self.base.null)).to(self.device)

    def draws(self, pictures: datasets.Pictures, n: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Batches of the first `n` pictures, each once in every band of t: the band, the first's place, and what a model is given."""
        generator = self.generator()
        clean = datasets.to_model(pictures.images[:n, : load(self.base.dataset).channels])
        noise = torch.randn(clean.shape, generator=generator)
        labels = self.labels(pictures.labels[:n])
        for band, t in enumerate(times(self.objective.schedule, TIMES, len(clean), generator)):
            for i in range(0, len(clean), self.batch):
                part = slice(i, i + self.batch)
                given = {"clean": clean[part], "noise": noise[part], "t": t[part]}
                moved = {k: v.to(self.device) for k, v in given.items()}
                yield band, i, moved | {"cond": {"class_labels": labels[part]}}

    @property
    def batch(self) -> int:
        """Samples in one pass; at least two batches, for the gradients of one to be compared with those of the other."""
        return min(50 if self.device == "cpu" else 500, -(-self.n // 2))

    @cached_property
    def held_out(self) -> datasets.Pictures:
        pictures = datasets.load(self.base.dataset).held_out
        order = torch.randperm(len(pictures), generator=self.generator())
        return pictures.select(order)

    def measure(self) -> Found:
        """Measure everything but the trajectories, which are pictures."""
        middles = self.objective.schedule.at((torch.arange(TIMES, dtype=torch.float64) + 0.5) / TIMES)
        found: Found = {"times": middles.tolist(), "bands of frequency": list(BANDS)}
        for part in (self.spectra, self.losses, self.unseen, self.gradients, self.left):
            found[part.__name__] = part()
            print(part.__name__, "done", flush=True)
        return found

    # --- what is measured ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def trajectories(self, n: int = 3) -> tuple[list[float], dict[str, Tensor]]:
        """Figure 5 of the paper: timesteps, and x̂_0 in pixels there, by model, shape (shown, n, C, H, W)."""
        noise, labels = self.start(n)
        found = {}
        for name, model, guidance in self.ways():
            scheduler = self.base.scheduler()
            scheduler.set_timesteps(STEPS)
            kept = torch.linspace(0, STEPS - 1, SHOWN).round().long().tolist()
            options = {"steps": STEPS, "null": self.base.null, "guidance": guidance}
            path = list(trajectory(model, scheduler, noise, labels, **options))
            t = scheduler.timesteps.to(self.device)
            clean = [clean_hat(self.objective, *path[i], t[i].expand(n)) for i in kept]
            found[name] = torch.stack([pixels(x) for x in clean]).cpu()
        return t[kept].tolist(), found

    def spectra(self) -> Found:
        """Power by frequency and how much the grid stands out, of samples, of held-out pictures and of as many training pictures."""
        data, noise_labels = load(self.base.dataset), self.start(self.n)
        order = torch.randperm(len(data.train), generator=self.generator())[: self.n]
        sets = {"held out": self.held_out.images[: self.n, : data.channels], "training": data.train.images[order]}
        for name, model, guidance in self.ways():
            options = {"steps": STEPS, "null": self.base.null, "guidance": guidance, "batch": self.batch}
            sets[name] = datasets.to_images(sample(model, self.base.scheduler(), *noise_labels, **options).cpu())
        spectra = {name: power(images.float() / 127.5 - 1).mean(0) for name, images in sets.items()}
        return {
            "power": {name: rings(spectrum) for name, spectrum in spectra.items()},
            "grid": {name: [grid(spectrum, period) for period in PERIODS] for name, spectrum in spectra.items()},
        }

    def losses(self) -> Found:
        """MSE of prediction and of x̂_0 by band of t, and of x̂_0 by spatial frequency, on held-out pictures.

        A ratio is that of a mean to the first model's; its error is the standard error of the difference, picture by picture.
        """
        count = min(self.n, len(self.held_out))
        square = {name: torch.zeros(2, TIMES, count) for name in self.models}
        energy = {name: torch.zeros(TIMES, len(BANDS)) for name in self.models}
        for band, place, given in self.draws(self.held_out, count):
            for name, model in self.models.items():
                both = errors(self.objective, model, **given)
                part = slice(place, place + len(both[0]))
                square[name][:, band, part] = torch.stack([e.square().mean((1, 2, 3)) for e in both]).cpu()
                energy[name][band] += by_band(power(pixels(both[1]))).sum(0).cpu() / count
        first = next(iter(square.values()))
        by_time = {}
        for name, values in square.items():
            difference = (values - first).std(2) / math.sqrt(count) / first.mean(2)
            ratio = values.mean(2) / first.mean(2)
            columns = [*values.mean(2), *ratio, *difference]
            keys = (f"{kind}{what}" for kind in ("", "ratio ", "error of ratio ") for what in ("prediction", "clean"))
            by_time[name] = dict(zip(keys, columns, strict=True))
        return {"n": count, "by time": by_time, "by frequency": energy}

    def unseen(self) -> Found:
        """What the teacher sees of the first model's errors of x̂_0, split by spatial frequency, at several t'.

        The errors are added to x_t', all of one size: the objective adds a multiple of them too, the same for every frequency.
        "white" is white noise of that size; "share" is how the error's energy is spread over the bands.
        """
        objective, model, generator = self.objective, next(iter(self.models.values())), self.generator()
        ranks = torch.tensor(RANKS, dtype=torch.float64)
        t_prime = objective.schedule.at(ranks).to(self.device)
        total, share, count = torch.zeros(len(RANKS), len(BANDS) + 1), torch.zeros(len(BANDS)), 0
        for _, _, given in self.draws(self.held_out, -(-self.n // TIMES)):
            clean, noise = given["clean"], given["noise"]
            error = pixels(errors(objective, model, **given)[1])
            share += by_band(power(error)).sum(0).cpu()
            parts = nn.functional.pixel_unshuffle(split(error).flatten(0, 1), 2).unflatten(0, (-1, len(clean)))
            white = torch.randn(clean.shape, generator=generator).to(self.device)
            changes = torch.cat([parts, white[None]])
            count += len(clean)
            for place, time in enumerate(t_prime):
                t = time.expand(len(clean))
                teacher = lambda x, t=t, cond=given["cond"]: objective.teacher(x, t, cond)  # noqa: E731
                total[place] += seen(teacher, objective.add_noise(clean, noise, t), changes, SIZE).sum(1).cpu()
        total /= count
        return {"t_prime": t_prime, "seen": total[:, :-1], "white": total[:, -1], "share": share / share.sum()}

    def gradients(self) -> Found:
        """The gradients of L_sp and L_mse on training pictures, by band of t: their spectra over the prediction, their angle over weights.

        "repeat" is the cosine of a gradient with itself on other pictures: what is left of it is the same direction.
        """
        found = {}
        data = load(self.base.dataset).train
        data = data.select(torch.randperm(len(data), generator=self.generator())[: self.n])
        for name, model in self.models.items():
            generator = torch.Generator(self.device).manual_seed(self.seed)  # of t'
            spectrum = torch.zeros(2, TIMES, len(BANDS))
            weights = torch.zeros(TIMES, 2, 2, sum(p.numel() for p in model.parameters()))
            for band, place, given in self.draws(data, self.n):
                of_prediction, of_weights = gradients(self.objective, model, **given, generator=generator)
                energy = [by_band(power(pixels(g))).sum(0) for g in of_prediction]
                spectrum[:, band] += torch.stack(energy).cpu()
                weights[band, place // self.batch % 2] += of_weights.cpu()
            whole = weights.sum(1)
            found[name] = {
                "share of sp": spectrum[0] / spectrum[0].sum(1, keepdim=True),
                "share of mse": spectrum[1] / spectrum[1].sum(1, keepdim=True),
                "cosine": [cosine(*both) for both in whole],
                "norm ratio": whole[:, 0].norm(dim=1) / whole[:, 1].norm(dim=1),
                "repeat of sp": [cosine(*halves[:, 0]) for halves in weights],
                "repeat of mse": [cosine(*halves[:, 1]) for halves in weights],
            }
        return found

    def left(self) -> Found:
        """What is left of L_sp's gradient where MSE has its minimum, by t' and band of t: the mean over x_t, and its standard error.

        The origins of an x_t are drawn by the first model from noisy held-out pictures.
        """
        objective, model, generator = self.objective, next(iter(self.models.values())), self.generator()
        second = torch.Generator(self.device).manual_seed(self.seed)  # of t'
        found: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(TIMES)] for name in SECOND}
        for band, _, given in self.draws(self.held_out, max(2, self.n * DRAWN_FROM // 1000)):
            t, cond = given["t"], given["cond"]
            x_t = objective.add_noise(given["clean"], given["noise"], t)
            times, many = t.repeat_interleave(DRAWS, 0), x_t.repeat_interleave(DRAWS, 0)
            conds = {k: v.repeat_interleave(DRAWS, 0) for k, v in cond.items()}
            clean = origins(objective, model, many, times, conds, ANCESTRAL, generator)
            alpha, sigma = (c[:, None, None, None] for c in objective.schedule(times))
            noise = ((many - alpha * clean) / sigma).to(clean.dtype)
            clean, noise = (x.unflatten(0, (-1, DRAWS)) for x in (clean, noise))
            for name, way in SECOND.items():
                t_prime = timesteps.get("t_prime", way)(objective.schedule, x_t, t=t, generator=second)
                found[name][band].append(left(objective, clean, noise, t, t_prime, cond).cpu())
        return {name: _mean_and_error([torch.cat(band) for band in bands]) for name, bands in found.items()}


def _mean_and_error(bands: Sequence[Tensor]) -> dict[str, list[float]]:
    """Mean and standard error of each band; without x_t of one origin, as at the first timestep, where there is no gradient (NaN)."""
    known = [values[~values.isnan()] for values in bands]
    return {
        "mean": [float(values.mean()) for values in known],
        "error": [float(values.std()) / math.sqrt(len(values)) for values in known],
    }
