"""Train the base model that the package ships: a small class-conditional UNet on emoji, by plain MSE.

v-prediction, zero terminal SNR, condition dropped for one sample in ten, EMA of the weights.
The shipped one: see perceptual_diffusion/assets/base/training.json for the command, the hardware and the date.

    python examples/train_base.py --out runs/base --steps 40000 --device cuda     # minutes on a GPU
    python examples/train_base.py --out runs/base --steps 6000 --batch 64         # hours on two cores
"""

import argparse
import copy
import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from perceptual_diffusion.cli import datasets


def build(classes: int) -> UNet2DModel:
    """A UNet of 3.9 M parameters on 12 x 16 x 16 (a 32 px picture, 2 x 2 pixels folded into channels)."""
    return UNet2DModel(
        sample_size=16,
        in_channels=12,
        out_channels=12,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        dropout=0.1,
        num_class_embeds=classes + 1,  # the last one is "no condition"
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of the paper: Stable Diffusion's, rescaled to zero terminal SNR, v-prediction, trailing steps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def augment(images: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
    """Mirror half of the pictures that may be, and shift each by up to two pixels on its white ground."""
    flip = mirror & (torch.rand(len(images), device=images.device) < 0.5)
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    dy, dx = torch.randint(0, 5, (2, len(images), 1), device=images.device)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), value=255)
    rows = torch.arange(32, device=images.device) + dy
    columns = torch.arange(32, device=images.device) + dx
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="emoji")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--ema", type=float, default=0.9995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", default="", help="a mode of torch.compile; empty: eager")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time, whatever --steps says")
    parser.add_argument("--snapshots", type=int, default=4, help="how many times the averaged weights are written")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    split = datasets.load(options.dataset)
    images, labels, mirror = (x.to(device) for x in (split.train.images, split.train.labels, split.train.mirror))
    held_out, held_labels = (
        datasets.to_model(split.held_out.images).to(device)[:2000],
        split.held_out.labels.to(device)[:2000],
    )
    scheduler = build_scheduler()
    alpha_bar = scheduler.alphas_cumprod.to(device, torch.float64)
    alphas, sigmas = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
    model = build(len(split.train.classes)).to(device)
    null = len(split.train.classes)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=cuda)
    run = torch.compile(model, mode=options.compile) if options.compile else model

    def noised(clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = alphas[t][:, None, None, None], sigmas[t][:, None, None, None]
        return alpha * clean + sigma * noise, alpha * noise - sigma * clean

    generator = torch.Generator(device).manual_seed(1)
    held_noise = torch.randn(held_out.shape, generator=generator, device=device)
    held_t = torch.randint(0, 1000, (len(held_out),), generator=generator, device=device)

    @torch.no_grad()
    def held_out_loss() -> float:
        ema.eval()
        x_t, target = noised(held_out, held_noise, held_t)
        return float(torch.nn.functional.mse_loss(ema(x_t, held_t, held_labels).sample, target))

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        copy.deepcopy(ema.module).half().save_pretrained(folder)
        scheduler.save_pretrained(folder)

    log, losses, start, logged = [], torch.zeros((), device=device), time.monotonic(), 0
    every = max(1, options.steps // 40)
    progress = tqdm(total=options.steps, mininterval=5)
    for step in range(1, options.steps + 1):
        model.train()
        index = torch.randint(0, len(images), (options.batch,), device=device)
        clean = datasets.to_model(augment(images[index], mirror[index]))
        label = torch.where(torch.rand(options.batch, device=device) < 0.1, null, labels[index])
        t = torch.randint(0, 1000, (options.batch,), device=device)
        x_t, target = noised(clean, torch.randn_like(clean), t)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, step / 500)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            prediction = run(x_t, t, label).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(model)
        losses += loss.detach()
        late = time.monotonic() - start > 60 * options.minutes
        if step % every == 0 or step == options.steps or late:
            row = {
                "step": step,
                "train": float(losses) / (step - logged),
                "held_out": held_out_loss(),
                "seconds": round(time.monotonic() - start),
            }
            losses.zero_()
            logged = step
            log.append(row)
            progress.update(step - progress.n)
            progress.set_postfix({k: round(v, 5) for k, v in row.items()})
        if step % max(1, options.steps // options.snapshots) == 0 and step < options.steps:
            write(options.out / f"step-{step}")
        if late:
            break
    progress.close()
    write(options.out / "final")
    record = {
        "command": "python " + " ".join(sys.argv),
        "seed": options.seed,
        "steps": logged,
        "batch": options.batch,
        "dataset": options.dataset,
        "pictures": len(images),
        "classes": list(split.train.classes),
        "parameters": sum(p.numel() for p in model.parameters()),
        "hardware": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.monotonic() - start),
        "log": log,
    }
    (options.out / "final" / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"{logged} steps in {record['seconds']} s, held-out loss {log[-1]['held_out']:.5f}, in {options.out / 'final'}"
    )


if __name__ == "__main__":
    main()
