"""Probe the layers of the packaged UNet and of a small DiT trained here on emoji; write JSON rows and plots.

    python benchmarks/layer_probe.py --out benchmarks/results/layer_probe.jsonl --plots docs/images

The DiT (12 blocks of width 96, 2.5 M parameters, 32 x 32 pictures as 64 tokens) takes 10 to 20 minutes on one core. It is no
good generator; it is trained to where its features are no longer those of random weights. As a control, both architectures
are also probed with random weights. The pictures probed on were held out of every training.
"""

import argparse
import copy
import json
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from perceptual_diffusion import adapters
from perceptual_diffusion.cli import datasets, demo
from perceptual_diffusion.inspection import Probe, probe_layers
from perceptual_diffusion.parameterizations import V_PREDICTION, mix


def train_dit(
    data: datasets.Pictures, scheduler: DDIMScheduler, *, steps: int, batch: int, seed: int, held_out: datasets.Pictures
) -> tuple[DiTTransformer2DModel, dict[str, Any]]:
    """Train a class-conditional DiT by MSE on v, and give its averaged weights and a record of the run."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=12,
        out_channels=12,
        num_layers=12,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=len(data.classes),
        dropout=0.0,
    )
    schedule = adapters.read(scheduler).schedule
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    start = time.monotonic()

    def loss_of(network: Any, clean: Tensor, labels: Tensor) -> Tensor:
        t = torch.randint(0, 1000, (len(clean),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        target = mix(clean, noise, *V_PREDICTION.row(schedule, t))
        output = network(mix(clean, noise, *schedule(t)), timestep=t, class_labels=labels).sample
        return torch.nn.functional.mse_loss(output, target)

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100, 2 * (steps - step) / steps)
        index = torch.randint(0, len(data), (batch,), generator=generator)
        flip = data.mirror[index] & (torch.rand(batch, generator=generator) < 0.5)
        images = data.images[index]
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        loss = loss_of(model, datasets.to_model(images), data.labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(model)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: {loss:.4f}, {time.monotonic() - start:.0f} s", flush=True)
    trained = copy.deepcopy(ema.module).eval()
    with torch.no_grad():
        rounds = [loss_of(trained, datasets.to_model(held_out.images), held_out.labels) for _ in range(8)]
    record = {
        "steps": steps,
        "batch": batch,
        "seconds": round(time.monotonic() - start),
        "held_out_loss": float(torch.stack(rounds).mean()),
    }
    return trained, record


def row(name: str, probe: Probe, seconds: float, training: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "model": name,
        **json.loads(probe.to_json()),
        "data": "emoji, held out",
        "training": training,
        "seconds": round(seconds),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plots", type=Path, help="folder for a plot of each trained model")
    parser.add_argument("--dit", type=Path, help="folder of the DiT; it is trained and saved there if there is none")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of the DiT")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    split = datasets.load("emoji")
    unet, scheduler = demo.load_base(len(split.train.classes))
    if options.dit is not None and (options.dit / "config.json").exists():
        dit = DiTTransformer2DModel.from_pretrained(options.dit, use_safetensors=True)
        training = json.loads((options.dit / "training.json").read_text("utf-8"))
    else:
        dit, training = train_dit(
            split.train, scheduler, steps=options.steps, batch=options.batch, seed=options.seed, held_out=split.held_out
        )
        if options.dit is not None:
            dit.save_pretrained(options.dit)
            (options.dit / "training.json").write_text(json.dumps(training))
    torch.manual_seed(options.seed)
    models = {
        "packaged UNet": (unet, None),
        "small DiT": (dit, training),
        "UNet, random weights": (UNet2DModel.from_config(unet.config), None),
        "DiT, random weights": (DiTTransformer2DModel.from_config(dit.config), None),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w") as file:
        for name, (model, record) in models.items():
            control = "random" in name
            for seed in (options.seed,) if control else (options.seed, options.seed + 1):
                order = torch.randperm(len(split.held_out), generator=torch.Generator().manual_seed(seed))
                data = split.held_out.select(order[: options.samples])
                start = time.monotonic()
                probe = probe_layers(
                    model,
                    datasets.to_model(data.images),
                    schedule=scheduler,
                    cond={"class_labels": data.labels},
                    draws=options.draws,
                    seed=seed,
                )
                file.write(json.dumps(row(name, probe, time.monotonic() - start, record)) + "\n")
                print(name, probe.table(), sep="\n", flush=True)
                if options.plots is not None and seed == options.seed and not control:
                    probe.plot(options.plots / f"layers-{name.split()[-1].lower()}.png")


if __name__ == "__main__":
    main()
