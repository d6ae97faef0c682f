"""Try recipes of the objective on the packaged base model and emoji; print one JSON row per recipe.

Each fine-tunes the base from the same weights, keeps an average of the weights (EMA), and samples the whole training distribution of classes from the same noise with 25 steps of DDIM.

    python benchmarks/emoji_recipes.py --out benchmarks/results/emoji_recipes.jsonl --device cuda
"""

import argparse
import json
import platform
import time
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from perceptual_diffusion import PAPER, SelfPerceptualObjective
from perceptual_diffusion.cli import datasets, metrics
from perceptual_diffusion.cli.sampling import sample

BASE = str(resources.files("perceptual_diffusion") / "assets/base")

RECIPES: dict[str, dict[str, Any]] = {
    "base": {"steps": 0},
    "base, guidance 2": {"steps": 0, "guidance": 2.0},
    "base, guidance 3": {"steps": 0, "guidance": 3.0},
    "mse, lr 1e-4": {"loss": "mse", "lr": 1e-4},
    "mse, lr 3e-5": {"loss": "mse", "lr": 3e-5},
    "sp, lr 1e-5": {"lr": 1e-5},
    "sp, lr 3e-5": {"lr": 3e-5},
    "sp, lr 1e-4": {"lr": 1e-4},
    "sp + mse 1": {"lr": 1e-4, "mse_weight": 1.0},
    "sp + mse 10": {"lr": 1e-4, "mse_weight": 10.0},
    "sp normalised + mse 1": {"lr": 1e-4, "mse_weight": 1.0, "distance": "normalised"},
    "sp normalised": {"lr": 3e-5, "distance": "normalised"},
    "sp mae": {"lr": 3e-5, "distance": "mae"},
    "sp near": {"lr": 3e-5, "t_prime": "near"},
    "sp near + mse 1": {"lr": 1e-4, "t_prime": "near", "mse_weight": 1.0},
    "sp down_blocks.2": {"lr": 3e-5, "layers": "down_blocks.2"},
    "sp down_blocks.1": {"lr": 3e-5, "layers": "down_blocks.1"},
    "sp down_blocks.1 + mse 1": {"lr": 1e-4, "layers": "down_blocks.1", "mse_weight": 1.0},
    "sp down + mid": {"lr": 3e-5, "layers": ["down_blocks.1", "down_blocks.2", "mid_block"]},
    "sp up_blocks.0": {"lr": 3e-5, "layers": "up_blocks.0"},
    "sp split": {"lr": 3e-5, "formulation": "split"},
    "sp no dropout": {"lr": 3e-5, "dropout": 0.0},
    "mse, same compute": {"loss": "mse", "lr": 1e-4, "steps": 1255},
    "sp + mse 30": {"lr": 1e-4, "mse_weight": 30.0},
    "sp + mse 100": {"lr": 1e-4, "mse_weight": 100.0},
    "sp normalised + mse 0.3": {"lr": 1e-4, "mse_weight": 0.3, "distance": "normalised"},
    "sp normalised + mse 3": {"lr": 1e-4, "mse_weight": 3.0, "distance": "normalised"},
    "sp normalised + mse 10": {"lr": 1e-4, "mse_weight": 10.0, "distance": "normalised"},
    "sp normalised near + mse 1": {"lr": 1e-4, "mse_weight": 1.0, "distance": "normalised", "t_prime": "near"},
    "sp normalised down_blocks.1 + mse 1": {
        "lr": 1e-4,
        "mse_weight": 1.0,
        "distance": "normalised",
        "layers": "down_blocks.1",
    },
    "sp cosine + mse 1": {"lr": 1e-4, "mse_weight": 1.0, "distance": "cosine"},
    "sp mae + mse 3": {"lr": 1e-4, "mse_weight": 3.0, "distance": "mae"},
}


def fine_tune(
    recipe: dict[str, Any], data: datasets.Pictures, device: torch.device, seed: int, steps: int, batch: int
) -> UNet2DModel:
    recipe = dict(recipe)
    steps, lr, loss_name = recipe.pop("steps", steps), recipe.pop("lr", 0.0), recipe.pop("loss", "sp")
    dropout = recipe.pop("dropout", None)
    model = UNet2DModel.from_pretrained(BASE, torch_dtype=torch.float32).to(device).train()
    if not steps:
        return model
    if dropout is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
    scheduler = DDIMScheduler.from_pretrained(BASE)
    objective = SelfPerceptualObjective.wrap(model, scheduler, seed=seed, **PAPER | recipe)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)
    images, labels = data.images.to(device), data.labels.to(device)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50)
        index = torch.randint(0, len(images), (batch,), device=device, generator=generator)
        clean = datasets.to_model(images[index])
        drop = torch.rand(batch, device=device, generator=generator) < 0.1
        cond = {"class_labels": torch.where(drop, len(data.classes), labels[index])}
        if loss_name == "mse":
            t = torch.randint(0, 1000, (batch,), device=device, generator=generator)
            noise = torch.randn(clean.shape, device=device, generator=generator)
            output = model(objective.add_noise(clean, noise, t), t, **cond).sample
            loss = torch.nn.functional.mse_loss(output, objective.target(clean, noise, t))
        else:
            loss = objective(model, clean, cond=cond)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(model)
    return ema.module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, action="append", help="may be given several times; default: 0")
    parser.add_argument("--part", default="0/1", help="run every n-th recipe, from the k-th: k/n")
    parser.add_argument("--only", action="append", help="names of recipes")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no recipe after this time")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    start = time.monotonic()
    data = datasets.load("emoji").train
    network = metrics.Network().to(device)
    real = metrics.features(network, data.images)
    part, parts = (int(x) for x in options.part.split("/"))
    runs = [(name, seed) for seed in options.seed or [0] for name in options.only or RECIPES][part::parts]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name, seed in runs:
        if time.monotonic() - start > 60 * options.minutes:
            break
        recipe = dict(RECIPES[name])
        guidance = recipe.pop("guidance", 1.0)
        begin = time.monotonic()
        model = fine_tune(recipe, data, device, seed, options.steps, options.batch)
        trained = time.monotonic()
        noise = torch.randn(len(data), 12, 16, 16, generator=torch.Generator().manual_seed(seed)).to(device)
        scheduler = DDIMScheduler.from_pretrained(BASE)
        made = sample(
            model,
            scheduler,
            noise,
            data.labels.to(device),
            guidance=guidance,
            null=len(data.classes),
            batch=1024 if device.type == "cuda" else 128,
        )
        pictures = datasets.to_images(made)
        row = {
            "recipe": name,
            **metrics.compare(real, metrics.features(network, pictures)),
            "nearest": float(metrics.nearest(data.images.to(device), pictures).mean()),
            "n": len(pictures),
            "steps": recipe.get("steps", options.steps),
            "batch": options.batch,
            "seed": seed,
            **{k: v for k, v in RECIPES[name].items() if k != "steps"},
            "seconds": round(trained - begin, 1),
            "hardware": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "date": datetime.now(UTC).date().isoformat(),
        }
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
