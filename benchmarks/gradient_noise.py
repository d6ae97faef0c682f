"""Measure the noise of the gradient for ways to draw t' and to spare the teacher; write one JSON row per way.

    python benchmarks/gradient_noise.py --sites 800 --seed 0 --out benchmarks/results/gradient_noise.jsonl

A batch is independent samples, so the covariance of its gradient is that of one sample over the batch size. For each of many
samples (picture, label, noise, t, dropout) of the packaged base on emoji, the gradient with respect to all of the student's
parameters is taken at several t'. Let p be the density of t' that the objective is defined by (uniform) and g the gradient
of L_sp. Drawn from q and weighted by p / q, its second moment is E_p[(p / q) |g|²]; kept with probability k and weighted by
1 / k, it is E[|g|² / k]. So the noise of every way follows from samples at uniform t'; the importance-drawn ones check it.

noise = trace of the covariance, over that of t' uniform and every step. efficiency = 1 / (noise × cost), likewise;
cost = 1 + r × (passes of the teacher per prediction) in MSE steps, with r = 3 F_enc / (MSE step) of Stable Diffusion 1.5.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor

from perceptual_diffusion import PAPER, SelfPerceptualObjective
from perceptual_diffusion.cli import datasets

BASE = str(resources.files("perceptual_diffusion") / "assets/base")
DISTANCES = ("mse", "normalised")
OBJECTIVES = {  # weight of L_mse, distance of L_sp, metric of the gradient
    "L_mse + L_sp, normalised": (1.0, "normalised", 0),
    "L_sp, normalised": (0.0, "normalised", 0),
    "L_sp, mse": (0.0, "mse", 0),
    "L_mse + L_sp, normalised, in Adam's metric": (1.0, "normalised", 2),
    "L_sp, mse, in Adam's metric": (0.0, "mse", 1),
}
UNIFORM = 4
"""Draws of t' from the uniform density for each sample."""
R = 0.348
DENSITIES = {  # q ∝ (1 − mix) |κ|^power + mix × uniform
    "κ²": (2.0, 0.0),
    "|κ|": (1.0, 0.0),
    "√|κ|": (0.5, 0.0),
    "κ² + 0.1": (2.0, 0.1),
    "κ² + 0.3": (2.0, 0.3),
    "|κ| + 0.1": (1.0, 0.1),  # t_prime="contributing"
    "|κ| + 0.3": (1.0, 0.3),
}
DRAWN = ("κ²", "|κ|")
"""Densities that t' is really drawn from, to check means and noise."""
FACTORS = ("t", "noise", "picture", "dropout", "all but t", "all but t and t'")
EVERY = 4
"""Single factors are drawn anew at every n-th sample."""
WIDTH = 2048
"""Dimensions of the sketch of a gradient."""
WARM_UP = 64
"""Samples that Adam's metric is taken from."""
RESAMPLED = 300
"""Bootstraps over samples."""


class Bench:
    """A student, its objectives and one sample's draws."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = UNet2DModel.from_pretrained(BASE, torch_dtype=torch.float32).train()
        scheduler = DDIMScheduler.from_pretrained(BASE)
        self.objectives = {
            d: SelfPerceptualObjective.wrap(self.model, scheduler, **PAPER | {"distance": d}) for d in DISTANCES
        }
        self.parameters = list(self.model.parameters())
        self.data = datasets.load("emoji").train
        self.generator = torch.Generator().manual_seed(seed)
        alpha, sigma = self.objectives["mse"].schedule(torch.arange(1000))
        self.kappa = (alpha[:, None] * sigma - sigma[:, None] * alpha).abs()  # [t, t']; of v-prediction, where Δ = 1
        self.densities = {"uniform": torch.full((1000, 1000), 1 / 1000, dtype=torch.float64)}
        for name, (power, mix) in DENSITIES.items():
            part = self.kappa**power
            self.densities[name] = (1 - mix) * part / part.sum(1, keepdim=True) + mix / 1000
        size = sum(p.numel() for p in self.parameters)
        self.signs = (torch.randint(0, 2, (size,), generator=self.generator) * 2 - 1).float()

    def picture(self) -> tuple[Tensor, Tensor]:
        index = torch.randint(0, len(self.data), (1,), generator=self.generator)
        drop = bool(torch.rand((), generator=self.generator) < 0.1)
        label = torch.tensor([len(self.data.classes)]) if drop else self.data.labels[index]
        return datasets.to_model(self.data.images[index]), label

    def draw(self) -> dict[str, Any]:
        """Everything that one sample's gradient depends on, but t'."""
        return {
            "picture": self.picture(),
            "t": torch.randint(0, 1000, (1,), generator=self.generator),
            "noise": torch.randn(1, 12, 16, 16, generator=self.generator),
            "dropout": int(torch.randint(0, 2**31, (1,), generator=self.generator)),
        }

    def t_prime(self, density: str, t: Tensor, count: int = 1) -> Tensor:
        weights = self.densities[density][int(t)]
        return torch.multinomial(weights, count, replacement=True, generator=self.generator)

    def gradients(self, sample: dict[str, Any], t_prime: Tensor) -> Tensor:
        """Give the gradients of L_mse and, distance by distance, of L_sp at each t', shape (1 + 2 K, parameters)."""
        (clean, label), t, noise, count = sample["picture"], sample["t"], sample["noise"], len(t_prime)
        torch.manual_seed(sample["dropout"])
        any_objective = self.objectives["mse"]
        output = self.model(any_objective.add_noise(clean, noise, t), t, class_labels=label).sample
        error = output.detach() - any_objective.target(clean, noise, t)
        directions = [2 * error / error.numel()]
        for objective in self.objectives.values():
            predicted = output.detach().repeat(count, 1, 1, 1).requires_grad_()
            loss = objective.loss(
                predicted,
                clean=clean.expand(count, -1, -1, -1),
                noise=noise.expand(count, -1, -1, -1),
                t=t.expand(count),
                t_prime=t_prime,
                cond={"class_labels": label.expand(count)},
                reduction="none",
            )
            directions += torch.autograd.grad(loss.sum(), predicted)[0].unsqueeze(1).unbind()
        found = torch.empty(len(directions), len(self.signs))
        for row, direction in zip(found, directions, strict=True):
            parts = torch.autograd.grad(output, self.parameters, direction, retain_graph=True)
            torch.cat([part.flatten() for part in parts], out=row)
        return found

    def sketch(self, gradients: Tensor) -> Tensor:
        """Fold signed gradients: inner products are kept in expectation, shape (K, WIDTH)."""
        tail = -gradients.shape[1] % WIDTH
        rows = (torch.nn.functional.pad(row * self.signs, (0, tail)) for row in gradients)
        return torch.stack([row.unflatten(0, (-1, WIDTH)).sum(0) for row in rows])


def collect(bench: Bench, sites: int) -> dict[str, Tensor]:
    """Give for each sample the Gram matrix of its gradients (plain, and in two metrics of Adam), sketches and times."""
    scale = torch.zeros(2, len(bench.signs))
    for _ in range(WARM_UP):  # Adam's second moments, of L_sp alone and of L_mse + L_sp
        sample = bench.draw()
        of_mse, pure, normalised = bench.gradients(sample, bench.t_prime("uniform", sample["t"]))
        scale += torch.stack([pure, of_mse + normalised]).square() / WARM_UP
    scale = scale.sqrt()
    scale = (1 / (scale + 1e-3 * scale.square().mean(1, keepdim=True).sqrt())).sqrt()
    scale[1] /= scale[0]
    kept: dict[str, list[Tensor]] = {name: [] for name in ("t", "t_prime", "gram", "sketch", "redrawn")}
    for site in range(sites):
        sample = bench.draw()
        times = [bench.t_prime("uniform", sample["t"], UNIFORM)] + [bench.t_prime(d, sample["t"]) for d in DRAWN]
        t_prime = torch.cat(times)
        gradients = bench.gradients(sample, t_prime)
        kept["t"].append(sample["t"])
        kept["t_prime"].append(t_prime)
        kept["sketch"].append(bench.sketch(gradients))
        if site % EVERY == 0:
            own = gradients[[0, 1, 1 + len(t_prime)]]
            kept["redrawn"].append(torch.stack([own @ theirs.T for theirs in redraw(bench, sample, t_prime)]))
        grams = [gradients @ gradients.T]
        for part in scale:
            gradients *= part
            grams.append(gradients @ gradients.T)
        kept["gram"].append(torch.stack(grams))
        if site % 50 == 49:
            print(f"{site + 1} samples", flush=True)
    return {name: torch.stack(values) for name, values in kept.items()}


def redraw(bench: Bench, sample: dict[str, Any], t_prime: Tensor) -> Iterator[Tensor]:
    """Give the gradients of L_mse and L_sp with one factor after the other drawn anew."""
    for factor in FACTORS:
        other = bench.draw()
        changed, at = {**sample, factor: other[factor]} if factor in other else {**other, "t": sample["t"]}, t_prime[:1]
        if factor == "all but t":
            at = bench.t_prime("uniform", sample["t"])
        yield bench.gradients(changed, at)


class Noise:
    """What the products say of an objective; each number with its bootstraps over samples behind it, (1 + RESAMPLED,)."""

    def __init__(self, bench: Bench, found: dict[str, Tensor], objective: str) -> None:
        mse_weight, distance, metric = OBJECTIVES[objective]
        self.t, self.t_prime = found["t"].long().flatten(), found["t_prime"].long()
        self.sites, count = self.t_prime.shape
        self.densities, self.kappa = bench.densities, bench.kappa[self.t[:, None], self.t_prime[:, :UNIFORM]]
        draws = torch.randint(0, self.sites, (RESAMPLED, self.sites), generator=torch.Generator().manual_seed(0))
        resampled = torch.stack([row.bincount(minlength=self.sites) for row in draws])
        self.counts = torch.cat([torch.ones(1, self.sites), resampled]).double()
        of_sp = slice(1 + count * DISTANCES.index(distance), 1 + count * (DISTANCES.index(distance) + 1))
        gram, sketch = found["gram"][:, metric].double(), found["sketch"].double()
        self.square = gram[:, of_sp, of_sp].diagonal(dim1=1, dim2=2)  # |g|² of L_sp at each t'
        self.of_mse, self.cross = mse_weight**2 * gram[:, 0, 0], mse_weight * gram[:, 0, of_sp]
        self.fixed = self.of_mse + 2 * self.cross[:, :UNIFORM].mean(1)  # what no way of drawing t' changes
        uniform = gram[:, of_sp, of_sp][:, :UNIFORM, :UNIFORM]
        pairs = uniform.sum((1, 2)) - uniform.diagonal(dim1=1, dim2=2).sum(1)
        self.shared = pairs / (UNIFORM * (UNIFORM - 1))  # |E[g | all but t']|²
        self.sp = sketch[:, of_sp]
        plain = torch.tensor(float(metric == 0))  # the sketch is of the plain metric; in Adam's, |mean|² is left out
        self.of_sp_mean = plain * self.norm_of_mean(self.sp[:, :UNIFORM].mean(1))
        self.of_mean = plain * self.norm_of_mean(mse_weight * sketch[:, 0] + self.sp[:, :UNIFORM].mean(1))
        self.uniform = self.trace(torch.ones_like(self.kappa))
        weights = torch.zeros(1 + len(DISTANCES), dtype=torch.float64)
        weights[0], weights[1 + DISTANCES.index(distance)] = mse_weight, 1.0
        self.redrawn = torch.einsum("i,nfij,j->fn", weights, found["redrawn"].double(), weights)

    def mean(self, values: Tensor) -> Tensor:
        return self.counts @ values / self.sites

    def norm_of_mean(self, vectors: Tensor) -> Tensor:
        """|E[v]|² without bias: products of different samples only."""
        same = self.counts.square()
        return ((self.counts @ vectors).square().sum(1) - same @ vectors.square().sum(1)) / (
            self.sites**2 - same.sum(1)
        )

    def trace(self, factor: Tensor, passes: int = 1) -> Tensor:
        """The noise with |g|² multiplied by a factor for each draw, and several t' for each prediction."""
        of_sp = (factor * self.square[:, :UNIFORM]).mean(1) / passes + (1 - 1 / passes) * self.shared
        return self.mean(self.fixed + of_sp) - self.of_mean

    def weight(self, density: str, draws: slice) -> Tensor:
        """Give p / q at the draws of t'; where q is 0, so is the gradient."""
        q = self.densities[density][self.t[:, None], self.t_prime[:, draws]]
        return torch.where(q > 0, 1 / (1000 * q), 0)

    def keep(self, share: float) -> Tensor:
        """Probabilities min(1, c |κ|) that keep this share of the samples on average."""
        low, high = 0.0, 1e9
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if float((middle * self.kappa).clamp(max=1).mean()) < share else (low, middle)
        return (high * self.kappa).clamp(1e-12, 1)

    def bound(self, bins: int = 6) -> Tensor:
        """The noise with q ∝ the root mean square of |g| in bins of t and t', found on one half and tried on the other."""
        square, of_t, of_t_prime = (
            self.square[:, :UNIFORM],
            self.t * bins // 1000,
            self.t_prime[:, :UNIFORM] * bins // 1000,
        )
        place, factor = of_t[:, None] * bins + of_t_prime, torch.empty_like(square)
        for half in (0, 1):
            own = torch.arange(self.sites) % 2 == half
            total = torch.zeros(bins**2).double().index_add(0, place[own].flatten(), square[own].flatten())
            number = place[own].flatten().bincount(minlength=bins**2)
            q = (total / number.clamp_min(1) + 0.01 * square[own].mean()).sqrt().view(bins, bins)
            factor[~own] = 1 / (q / q.mean(1, keepdim=True))[of_t[~own, None], of_t_prime[~own]]
        return self.trace(factor)

    def ways(self) -> Iterator[tuple[str, Tensor, float]]:
        """Name, noise and the teacher's passes per prediction of every way."""
        one, draws = torch.ones_like(self.kappa), slice(0, UNIFORM)
        yield "t' uniform", self.uniform, 1.0
        for q in DENSITIES:
            yield f"t' ∝ {q}", self.trace(self.weight(q, draws)), 1.0
        for place, q in enumerate(DRAWN, start=UNIFORM):
            w = self.weight(q, slice(place, place + 1))[:, 0]
            square = self.of_mse + 2 * w * self.cross[:, place] + w.square() * self.square[:, place]
            yield f"t' ∝ {q}, drawn", self.mean(square) - self.of_mean, 1.0
        yield "t' ∝ |g| in bins (bound)", self.bound(), 1.0
        for share in (0.9, 0.75, 0.5):
            yield f"roulette ∝ |κ|, {share:g}", self.trace(1 / self.keep(share)), share
            yield f"random {share:g} of the samples", self.trace(one / share), share
        of_sp = self.mean(self.square[:, :UNIFORM].mean(1)) - self.of_sp_mean
        for every in (2, 4):
            yield f"every={every}", self.uniform + (every - 1) * of_sp, 1 / every
        for passes in (2, 4):
            yield f"{passes} t' uniform", self.trace(one, passes), float(passes)
            yield f"{passes} t' ∝ |κ| + 0.1", self.trace(self.weight("|κ| + 0.1", draws), passes), float(passes)

    def factors(self) -> Iterator[tuple[str, float, float]]:
        """The part of the noise that each factor has a hand in, or that it makes alone, with its standard error."""
        within = self.mean(self.square[:, :UNIFORM].mean(1) - self.shared) / self.uniform
        yield "t'", float(within[0]), float(within[1:].std())
        own = (self.of_mse + 2 * self.cross[:, 0] + self.square[:, 0])[::EVERY]
        for factor, theirs in zip(FACTORS, self.redrawn, strict=True):
            alone = factor.startswith("all but")
            part = theirs - self.of_mean[0] if alone else own - theirs
            scale = float(self.uniform[0] if alone else own.mean())
            name = factor.replace("all but", "only") if alone else factor
            yield name, float(part.mean()) / scale, float(part.std()) / len(part) ** 0.5 / scale

    def shifts(self) -> Iterator[tuple[str, float, float]]:
        """Importance-drawn minus uniform gradients along the mean, over its length, with their standard error."""
        uniform = self.sp[:, :UNIFORM].mean(1)
        mean = uniform.mean(0)
        for place, q in enumerate(DRAWN, start=UNIFORM):
            along = (self.weight(q, slice(place, place + 1)) * self.sp[:, place] - uniform) @ mean / mean.square().sum()
            yield q, float(along.mean()), float(along.std()) / self.sites**0.5


def rows(bench: Bench, found: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    for objective, (mse_weight, _, metric) in OBJECTIVES.items():
        noise = Noise(bench, found, objective)
        sizes = {"E|g_sp|²": float(noise.square[:, :UNIFORM].mean()), "trace": float(noise.uniform[0])}
        yield {"objective": objective, **({"E|g_mse|²": float(noise.of_mse.mean())} if mse_weight else {}), **sizes}
        for way, trace, passes in noise.ways():
            ratio = trace / noise.uniform
            efficiency = (1 + R) / (ratio * (1 + R * passes))
            row = {"noise": ratio, "efficiency": efficiency}
            numbers = {k: float(v) for n, x in row.items() for k, v in ((n, x[0]), (f"{n} ±", x[1:].std()))}
            yield {"objective": objective, "way": way, "passes": passes, **numbers}
        if not metric:  # what was drawn anew, and the sketches, are in the plain metric
            for factor, part, error in noise.factors():
                yield {"objective": objective, "factor": factor, "part": part, "part ±": error}
            for way, shift, error in noise.shifts():
                yield {"objective": objective, "way": f"t' ∝ {way}, drawn", "shift": shift, "shift ±": error}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sites", type=int, default=800, help="samples, at least 5")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bench = Bench(options.seed)
    found = collect(bench, options.sites)
    of_run = {"sites": options.sites, "seed": options.seed, "r": R, "date": str(datetime.now(UTC).date())}
    with options.out.open("w", encoding="utf-8") as file:
        for row in rows(bench, found):
            row |= of_run | {"hardware": f"{os.cpu_count()}-core CPU, {platform.machine()}"}
            print(
                json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, ensure_ascii=False),
                file=file,
            )
            print(*row.values())


if __name__ == "__main__":
    main()
