"""Measure the error of the loss's gradient for teachers in half precision and with quantised weights.

    python benchmarks/teacher_precision.py --out benchmarks/results/teacher_precision.jsonl

Two trained models: the packaged UNet on held-out emoji, tapped at its middle, and a small DiT that is trained on scikit-learn's
digits first (about two minutes on one core). Each predicts at uniform t; the prediction and the true pair are noised to t'
and go through the teacher. The error of a batch is |g - g32| / |g32| of the gradient g of the loss with respect to the
prediction, where g32 is that of the float32 teacher; "median" is the median over samples of the error of each one's own.

Every variant sees the same batches. torchao and bitsandbytes are used if they are installed. The last rows are of tiny EDM
denoisers with random weights, which run their network in fp16: what of the error is underflow, and what is rounding.

    python benchmarks/teacher_precision.py --out benchmarks/results/teacher_precision.jsonl --tables docs/precision.md

writes the tables of rows that are there.
"""

import argparse
import contextlib
import copy
import itertools
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from sklearn.datasets import load_digits
from torch import Tensor, nn

from perceptual_diffusion import PAPER, SelfPerceptualObjective, adapters, schedules, timesteps
from perceptual_diffusion.cli import datasets, demo
from perceptual_diffusion.parameterizations import V_PREDICTION, System, mix
from perceptual_diffusion.renoising import mix_samples, prediction_error, renoise
from perceptual_diffusion.teachers import ModuleTeacher

BF16, FP16 = torch.bfloat16, torch.float16
BINS = ((1, 10), (10, 40), (40, 100), (100, 300), (300, 999))
FEW = 2
CHOICES = ("uniform", "near", "shifted", *BINS)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trained model and its data.

    Attributes:
        name: its name in the rows.
        model: the student, which is also the teacher, in float32.
        objective: its objective.
        clean: held-out data, (N, *).
        labels: their classes, (N,).
    """

    name: str
    model: nn.Module
    objective: SelfPerceptualObjective
    clean: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A teacher.

    Attributes:
        name: its name in the rows.
        make: changes a copy of the module, and gives it.
        dtype: what everything is cast to before the pass; None leaves that to the package.
        autocast: dtype of an autocast around the pass.
        scaled: scale the gradient of the features by a power of two, sample by sample, so that its largest is about this.
        only: "forward" or "backward": the other one is taken from the float32 teacher.
        over: how many numbers the loss is the mean of; None for those of the batch's features.
        few: measure two batches only: fp16 is slow on a CPU without its arithmetic.
    """

    name: str
    make: Callable[[nn.Module], nn.Module] = lambda module: module
    dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None
    scaled: float | None = None
    only: str = ""
    over: int | None = None
    few: bool = False


def torchao(name: str, every: type[nn.Module] = nn.Linear) -> Callable[[nn.Module], nn.Module]:
    def quantise(module: nn.Module) -> nn.Module:
        import torchao.quantization as ao

        ao.quantize_(module, getattr(ao, name)(), filter_fn=lambda part, _: isinstance(part, every))
        return module

    return quantise


def layerwise(module: Any) -> nn.Module:
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return module  # type: ignore[no-any-return]


def bitsandbytes(kind: str) -> Callable[[nn.Module], nn.Module]:
    def quantise(module: nn.Module) -> nn.Module:
        import bitsandbytes as bnb

        for parent in list(module.modules()):
            for name, part in list(parent.named_children()):
                if type(part) is not nn.Linear:
                    continue
                sizes = part.in_features, part.out_features, part.bias is not None
                if kind == "int8":
                    new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
                else:
                    new = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
                    # else a pass without grad packs the weights for a kernel that has no backward
                    new.support_avx512bf16_for_cpu = False
                new.load_state_dict(part.state_dict())
                parent._modules[name] = new.requires_grad_(False).to("cpu")
        return module

    return quantise


def cast(dtype: torch.dtype) -> Callable[[nn.Module], nn.Module]:
    return lambda module: module.to(dtype)


def but_first(module: Any) -> nn.Module:
    """Half precision, but for the layer that the sample enters: its output, the residual stream, then stays in float32."""
    module.to(BF16)
    (module.conv_in if hasattr(module, "conv_in") else module.pos_embed).float()
    return module  # type: ignore[no-any-return]


LARGE = 64 * 1280 * 8 * 8
"""Numbers that the mean is over in Stable Diffusion 1.5: the middle's 1280 x 8 x 8, and a batch of 64."""

VARIANTS = [
    Variant(name="bf16", make=cast(BF16)),
    Variant(name="bf16, first layer float32", make=but_first),
    Variant(name="bf16, inputs cast", make=cast(BF16), dtype=BF16),
    Variant(name="float32 under bf16 autocast", autocast=BF16),
    Variant(name="bf16 forward, float32 backward", make=cast(BF16), only="forward"),
    Variant(name="float32 forward, bf16 backward", make=cast(BF16), only="backward"),
    Variant(name="fp16", make=cast(FP16), few=True),
    Variant(name="fp16, scaled to 1", make=cast(FP16), scaled=1.0, few=True),
    Variant(name="fp16, mean over 5 M", make=cast(FP16), over=LARGE, few=True),
    Variant(name="fp16, mean over 5 M, scaled to 1", make=cast(FP16), over=LARGE, scaled=1.0, few=True),
    Variant(name="torchao int8 weights", make=torchao("Int8WeightOnlyConfig")),
    Variant(name="torchao fp8 weights", make=torchao("Float8WeightOnlyConfig")),
    Variant(name="torchao int8 weights, rest bf16", make=lambda m: torchao("Int8WeightOnlyConfig")(m.to(BF16))),
    Variant(name="torchao int8 weights and activations", make=torchao("Int8DynamicActivationInt8WeightConfig")),
    Variant(name="diffusers fp8 storage", make=layerwise),
    Variant(name="bitsandbytes int8", make=bitsandbytes("int8")),
    Variant(name="bitsandbytes nf4", make=bitsandbytes("nf4")),
]


def train_dit(scheduler: Any, images: Tensor, labels: Tensor, *, seconds: float, seed: int) -> nn.Module:
    """Train a DiT of 8 blocks by MSE on v, on digits of 8 x 8 pixels as 16 tokens."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=24, in_channels=1, out_channels=1, num_layers=8, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, dropout=0.0,
    )  # fmt: skip
    schedule = adapters.read(scheduler).schedule
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    start, steps, losses = time.process_time(), 0, []
    while (spent := time.process_time() - start) < seconds:
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (steps + 1) / 100, 2 * (1 - spent / seconds))
        index = torch.randint(0, len(images), (64,), generator=generator)
        t = torch.randint(0, 1000, (64,), generator=generator)
        clean, noise = images[index], torch.randn(64, *images.shape[1:], generator=generator)
        output = model(mix(clean, noise, *schedule(t)), timestep=t, class_labels=labels[index]).sample
        loss = torch.nn.functional.mse_loss(output, mix(clean, noise, *V_PREDICTION.row(schedule, t)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        losses.append(float(loss))
    print(f"DiT: {steps} steps, v-loss {sum(losses[-100:]) / 100:.3f}", flush=True)
    return model.eval()


def cases(options: argparse.Namespace) -> Iterator[Case]:
    split = datasets.load("emoji")
    unet, scheduler = demo.load_base(len(split.train.classes))
    held_out = datasets.to_model(split.held_out.images)
    objective = SelfPerceptualObjective.wrap(unet.eval(), scheduler, **PAPER)
    yield Case(name="packaged UNet", model=unet, objective=objective, clean=held_out, labels=split.held_out.labels)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    if options.dit is not None and (options.dit / "config.json").exists():
        dit = DiTTransformer2DModel.from_pretrained(options.dit, use_safetensors=True).eval()
    else:
        dit = train_dit(scheduler, images[:1500], labels[:1500], seconds=options.seconds, seed=options.seed)
        if options.dit is not None:
            dit.save_pretrained(options.dit)
    objective = SelfPerceptualObjective.wrap(dit, DDIMScheduler.from_config(scheduler.config), **PAPER)
    yield Case(name="small DiT", model=dit, objective=objective, clean=images[1500:], labels=labels[1500:])


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the teacher is given: the predicted pair and the true pair at t', (B, *), and d x̂_t' / d ŷ = κ, (B,)."""

    predicted: Tensor
    true: Tensor
    t_prime: Tensor
    kappa: Tensor
    cond: dict[str, Any]


def batch(case: Case, choice: Any, size: int, generator: torch.Generator) -> Batch:
    """Draw data, noise, t and t', and let the student predict."""
    schedule = case.objective.schedule
    index = torch.randint(0, len(case.clean), (size,), generator=generator)
    clean, cond = case.clean[index], {"class_labels": case.labels[index]}
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.randint(0, 1000, (size,), generator=generator)
    if isinstance(choice, str):
        t_prime = timesteps.get("t_prime", choice)(schedule, clean, t=t, generator=generator)
    else:
        apart = torch.randint(*choice, (size,), generator=generator)
        low, high = t - apart, t + apart
        up = (torch.rand(size, generator=generator) < 0.5) & (high <= 999) | (low < 0)
        t_prime = torch.where(up, high, low).clamp(0, 999)
    system = System.of(schedule, V_PREDICTION, t)
    with torch.no_grad():
        x_t = mix_samples(clean, noise, schedule(t))
        output = case.objective.call(case.model, x_t, t, cond)
        error = prediction_error(case.objective.output(output, clean), clean, noise, system)
        alpha, sigma = scales = schedule(t_prime)
        true = mix_samples(clean, noise, scales)
        (predicted,) = renoise(true, error, system=system, scales=scales, formulation="joint")
    kappa = (sigma * system.alpha - alpha * system.sigma) / system.determinant
    return Batch(predicted=predicted, true=true, t_prime=t_prime, kappa=kappa, cond=cond)


Pass = tuple[list[Tensor], list[Tensor]]


def features(teacher: ModuleTeacher, given: Batch, x: Tensor, dtype: torch.dtype | None) -> Pass:
    cond = given.cond
    true = given.true
    if dtype is not None:
        x, true = x.to(dtype), true.to(dtype)
    found = teacher(x, given.t_prime, cond)
    with torch.no_grad():
        return found, teacher(true, given.t_prime, cond)


def gradient(teacher: ModuleTeacher, full: ModuleTeacher, variant: Variant, given: Batch) -> Tensor:
    """Give the gradient of the loss (mean squared distance, mean over the batch) with respect to the prediction, (B, N)."""
    size = len(given.true)

    def run(of: ModuleTeacher, dtype: torch.dtype | None) -> tuple[Tensor, Pass]:
        x = given.predicted.clone().requires_grad_()
        autocast = torch.autocast("cpu", dtype=variant.autocast or BF16, enabled=variant.autocast is not None)
        with autocast if of is not full else contextlib.nullcontext():
            return x, features(of, given, x, dtype)

    x, (found, true) = run(teacher, variant.dtype)
    ahead, back = (x, found, true), (x, found)
    if variant.only == "forward":
        x, (found, _) = run(full, None)
        back = x, found
    elif variant.only == "backward":
        ahead = run(full, None)[0], *run(full, None)[1]
    over = [variant.over or f.numel() for f in ahead[1]]
    cotangents = [2 * (f.float() - g.float()) / n for f, g, n in zip(*ahead[1:], over, strict=True)]
    factor = torch.ones(size)
    if variant.scaled is not None:
        largest = torch.stack([c.abs().flatten(1).amax(1) for c in cotangents]).amax(0)
        factor = torch.exp2((variant.scaled / largest.clamp(min=1e-30)).log2().floor())
    scaled = [
        (c * factor.reshape(-1, *[1] * (c.ndim - 1))).to(f.dtype) for c, f in zip(cotangents, back[1], strict=True)
    ]
    (grad,) = torch.autograd.grad(back[1], back[0], [c.detach() for c in scaled])
    return grad.float().flatten(1) * (given.kappa / factor * over[0] / found[0].numel())[:, None]


def measure(case: Case, variant: Variant, batches: dict[Any, list[tuple[Batch, Tensor]]], full: ModuleTeacher) -> Any:
    module = variant.make(copy.deepcopy(case.model).eval().requires_grad_(False))
    like = case.objective.teacher
    teacher = ModuleTeacher(module, layers=like.layers, call=like.call, select=like.select)
    result = {}
    for choice, given in batches.items():
        apart, each = [], []
        for one, expected in given[: FEW if variant.few else None]:
            got = gradient(teacher, full, variant, one)
            kept = one.kappa.abs() > 1e-6
            apart.append(float((got - expected).norm() / expected.norm()))
            each.append(((got - expected).norm(dim=1) / expected.norm(dim=1))[kept])
        key = choice if isinstance(choice, str) else f"{choice[0]}..{choice[1] - 1}"
        finite = all(map(math.isfinite, apart))
        result[key] = {
            "error": sum(apart) / len(apart) if finite else None,
            "worst": max(apart) if finite else None,
            "median": float(torch.cat(each).nan_to_num(math.inf).median()),
        }
    return result


def edm_rows() -> Iterator[dict[str, Any]]:
    """Measure fp16 denoisers D(x, sigma) of the tests, with an error of the prediction of a tenth of the data."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from edm_models import EDM2Precond, EDMPrecond

    for make, size in itertools.product((EDMPrecond, EDM2Precond), (8, 32)):
        torch.manual_seed(0)
        half = make(resolution=size, use_fp16=True).eval().requires_grad_(False)
        full = copy.deepcopy(half)
        full.use_fp16 = False
        layers = SelfPerceptualObjective.wrap(make(resolution=size), schedules.EDM()).teacher.layers
        clean, noise, wrong = torch.randn(3, 64 if size == 8 else 16, 3, size, size)
        for sigma in (0.02, 0.5, 20.0):
            true = 0.5 * clean + sigma * noise
            given = Batch(
                predicted=true + 0.05 * wrong * (1 - sigma / 0.8), true=true, kappa=torch.ones(len(clean)), cond={},
                t_prime=torch.full((len(clean),), sigma),
            )  # fmt: skip
            rounded, exact = (
                ModuleTeacher(net, layers=layers, call=lambda m, x, t, cond: m(x, t)) for net in (half, full)
            )
            (f,), (g,) = features(exact, given, given.predicted, None)
            (f16,), (g16,) = features(rounded, given, given.predicted, None)
            expected = gradient(exact, exact, Variant(name=""), given)
            ways = {"unscaled": Variant(name=""), "scaled": Variant(name="", scaled=1.0)}
            ways["backward"] = Variant(name="", scaled=1.0, only="backward")
            yield {
                "model": f"{make.__name__}, {size} px", "sigma'": sigma, "size": len(clean),
                "largest": float((2 * (f - g) / f.numel()).abs().max()),
                "difference": float(((f16.float() - g16.float()) - (f - g)).norm() / (f - g).norm()),
                **{
                    name: float((gradient(rounded, exact, way, given) - expected).norm() / expected.norm())
                    for name, way in ways.items()
                },
            }  # fmt: skip


def tables(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the tables between their marks."""
    text = path.read_text("utf-8")
    for mark, made in (
        ("UNet", _table(rows, "packaged UNet")),
        ("DiT", _table(rows, "small DiT")),
        ("EDM", _edm_table(rows)),
    ):
        start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
        before, rest = text.split(start)
        text = f"{before}{start}{made}{end}{rest.split(end)[1]}"
    path.write_text(text, "utf-8")


def _table(rows: list[dict[str, Any]], model: str) -> str:
    rows = [row for row in rows if row["model"] == model and "errors" in row]
    rows.sort(key=lambda row: [v.name for v in VARIANTS].index(row["teacher"]))
    names = list(rows[0]["errors"])
    lines = [f"| teacher | {' | '.join(names)} | N | time |", "|---" * (len(names) + 3) + "|"]
    for row in rows:
        cells = (f"{100 * e['error']:.1f}, {100 * e['median']:.1f}" for e in row["errors"].values())
        spent = f"{row['time']:.2f}" if row["time"] else "–"
        lines.append(f"| {row['teacher']} | {' | '.join(cells)} | {row['batches'] * row['size']} | {spent} |")
    return "\n".join(lines) + "\n"


def _edm_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| denoiser | σ' | largest gradient of a feature | difference of the features | gradient | scaled | backward alone |"
    ]
    lines.append("|---" * 7 + "|")
    for row in (row for row in rows if "sigma'" in row):
        cells = (f"{100 * row[name]:.1f} %" for name in ("difference", "unscaled", "scaled", "backward"))
        sigma = row["sigma'"]
        lines.append(f"| {row['model']} | {sigma:g} | {row['largest']:.1e} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def seconds(case: Case, variant: Variant, given: Batch, full: ModuleTeacher) -> float:
    """CPU time of one gradient, the least of several: of the pass with grad, the pass without, and the backward."""
    module = variant.make(copy.deepcopy(case.model).eval().requires_grad_(False))
    like = case.objective.teacher
    teacher = ModuleTeacher(module, layers=like.layers, call=like.call, select=like.select)
    times = []
    for _ in range(6):
        start = time.process_time()
        gradient(teacher, full, variant, given)
        times.append(time.process_time() - start)
    return min(times[1:])


def _when(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "seed": options.seed,
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} thread, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dit", type=Path, help="folder of the DiT; it is trained and saved there if there is none")
    parser.add_argument("--seconds", type=float, default=120, help="CPU seconds of training of the DiT")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--size", type=int, default=24, help="samples in a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="names of teachers")
    parser.add_argument("--tables", type=Path, help="write the tables of the rows into this file, and measure nothing")
    parser.add_argument("--append", action="store_true", help="add to the rows that are there")
    options = parser.parse_args()
    if options.tables is not None:
        tables([json.loads(line) for line in options.out.read_text("utf-8").splitlines()], options.tables)
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a" if options.append else "w") as file:
        if options.only is None or "EDM" in options.only:
            file.writelines(json.dumps(row | _when(options)) + "\n" for row in edm_rows())
        for case in cases(options) if options.only != ["EDM"] else ():
            like = case.objective.teacher
            full = ModuleTeacher(
                copy.deepcopy(case.model).eval(), layers=like.layers, call=like.call, select=like.select
            )
            plain = Variant(name="float32")
            batches: dict[Any, list[tuple[Batch, Tensor]]] = {}
            for place, choice in enumerate(CHOICES):
                generator = torch.Generator().manual_seed(1000 * options.seed + place)
                drawn = [batch(case, choice, options.size, generator) for _ in range(options.batches)]
                batches[choice] = [(one, gradient(full, full, plain, one)) for one in drawn]
            one = batches["uniform"][0][0]
            base = seconds(case, plain, one, full)
            for variant in (v for v in VARIANTS if options.only is None or v.name in options.only):
                row: dict[str, Any] = {"model": case.name, "teacher": variant.name}
                try:
                    row["errors"] = measure(case, variant, batches, full)
                    row["time"] = None if variant.only else seconds(case, variant, one, full) / base
                except ImportError as error:
                    row["skipped"] = str(error)
                except (RuntimeError, ValueError, NotImplementedError) as error:
                    row["failed"] = f"{type(error).__name__}: {error}"
                row |= {"batches": FEW if variant.few else options.batches, "size": options.size} | _when(options)
                file.write(json.dumps(row) + "\n")
                file.flush()
                shown = {k: f"{v['error'] or math.nan:.3f}/{v['median']:.3f}" for k, v in row.get("errors", {}).items()}
                print(case.name, variant.name, f"time {row.get('time') or 0:.2f}", shown or row, flush=True)


if __name__ == "__main__":
    main()
