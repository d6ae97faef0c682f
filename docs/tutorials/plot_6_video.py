"""
Video: eight frames of a rabbit
===============================

A clip is a sample of shape ``(channels, frames, height, width)``; the objective takes it as it is. diffusers'
``UNet3DConditionModel``, which mixes the frames by convolution and attention over time, learns one shot of *Big Buck
Bunny*.
"""

import base64
import copy
import io
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet3DConditionModel
from matplotlib import pyplot as plt
from PIL import Image
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from torchvision.utils import make_grid

from perceptual_diffusion import SelfPerceptualObjective
from perceptual_diffusion.inspection import step_cost

BASE_STEPS, STEPS, BATCH, SAMPLES = 160, 16, 4, 6
# sphinx_gallery_start_ignore
import os  # noqa: E402

if os.environ.get("TUTORIALS_QUICK"):
    BASE_STEPS, STEPS, BATCH, SAMPLES = 2, 1, 2, 1
# sphinx_gallery_end_ignore

path = Path("data/bunny.webp")
if not path.exists():
    raise SystemExit(f"{str(path)!r} is not here. Run this in the folder docs/tutorials of a clone.")
with Image.open(path) as image:
    sheet = torch.from_numpy(np.array(image.convert("RGB")))
frames = sheet.unflatten(0, (-1, 45)).unflatten(2, (12, 80)).permute(0, 2, 4, 1, 3).flatten(0, 1)
print(f"{len(frames)} frames of {frames.shape[-1]} x {frames.shape[-2]} pixels, 25 a second")

# %%
# Clips
# -----
# Eight frames, three apart, so that a clip lasts about a second, cut to 32 x 32 pixels around the rabbit. Clips that
# overlap are near copies, so the last part of the shot is held out, not every tenth clip. 4 x 4 pixels are folded
# into channels: ``(48, 8, 8, 8)``.

FRAMES, APART = 8, 3
cut = frames[:, :, 5:37, 2:34]
clips = torch.stack([cut[i : i + FRAMES * APART : APART] for i in range(len(cut) - FRAMES * APART + APART)])
train, held_out = clips[:84], clips[-6:]
print(f"{len(train)} clips to train on, {len(held_out)} held out, {tuple(train.shape[1:])}")


def to_model(clips):
    """Turn uint8 clips (B, F, 3, 32, 32) into (B, 48, F, 8, 8) in [-1, 1]."""
    return pixel_unshuffle(clips.float() / 127.5 - 1, 4).transpose(1, 2)


def to_clips(sample):
    """Undo ``to_model``, clamped."""
    return ((pixel_shuffle(sample.transpose(1, 2), 4).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Gif:
    """A moving picture of rows of clips, uint8 (N, F, 3, 32, 32) each."""

    def __init__(self, rows):
        self.rows = rows

    def _repr_html_(self):
        text = []
        for name, clips in self.rows.items():
            pictures = [
                Image.fromarray(make_grid(clips[:, k], nrow=6, pad_value=255).permute(1, 2, 0).numpy())
                for k in range(FRAMES)
            ]
            pictures = [p.resize((3 * p.width, 3 * p.height), Image.Resampling.NEAREST) for p in pictures]
            buffer = io.BytesIO()
            pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=120, loop=0)
            source = base64.b64encode(buffer.getvalue()).decode()
            image = f'<img style="max-width: 100%" alt="moving clips: {name}" src="data:image/gif;base64,{source}">'
            text.append(f"<p>{name}<br>{image}</p>")
        return "".join(text)


Gif({"training clips": train[::15][:6], "held-out clips": held_out})

# %%
# The base
# --------
# The UNet's attention to a text gets a zero. It predicts the clean clip.

torch.manual_seed(0)
base = UNet3DConditionModel(
    sample_size=8,
    in_channels=48,
    out_channels=48,
    block_out_channels=(32, 48),
    layers_per_block=1,
    norm_num_groups=8,
    attention_head_dim=4,
    cross_attention_dim=8,
    down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
    up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
)
for module in base.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0  # a tenth, in the convolutions over time: too much for so small a model
scheduler = DDIMScheduler(
    prediction_type="sample",
    beta_schedule="scaled_linear",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
    clip_sample=False,
)


def no_text(count):
    return {"encoder_hidden_states": torch.zeros(count, 1, 8)}


def train_model(model, loss_of, steps, lr, *, seed):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    draws = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (steps - step) / (0.4 * steps))
        clean = to_model(train[torch.randint(0, len(train), (BATCH,), generator=draws)])
        noise = torch.randn(clean.shape, generator=draws)
        t = torch.randint(0, 1000, (BATCH,), generator=draws)
        clean_hat = model(scheduler.add_noise(clean, noise, t), t, **no_text(BATCH)).sample
        loss = loss_of(clean_hat, clean, noise, t)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


def mse(clean_hat, clean, noise, t):
    return torch.nn.functional.mse_loss(clean_hat, clean)


print(f"{sum(p.numel() for p in base.parameters()):,} parameters; variance of the clips {to_model(train).var():.3f}")
print(f"L_mse of the last of {BASE_STEPS} steps: {train_model(base, mse, BASE_STEPS, 3e-3, seed=0):.3f}")

# %%
# Fine-tune twice
# ---------------
# The features compared are maps of each frame; the class is known, and so is where the frames are in them. Clips are
# large, so memory is what runs out first: ``micro_batch=1`` lets one clip at a time through the teacher.

student = copy.deepcopy(base)
objective = SelfPerceptualObjective.wrap(student, scheduler, micro_batch=1, seed=0)
clean, t = to_model(train[:BATCH]), torch.full((BATCH,), 500)
print(objective.check(student, clean, cond=no_text(BATCH)))
cost = step_cost(base, lambda: base(clean, t, **no_text(BATCH)).sample, objective.teacher.layers, sample=clean)
mse_steps = round(STEPS * cost.ratio)
print(f"a step costs {cost.ratio:.2f} x an MSE step: {STEPS} steps, and {mse_steps} with MSE")


def self_perceptual(clean_hat, clean, noise, t):
    return objective.loss(clean_hat, clean=clean, noise=noise, t=t, cond=no_text(BATCH))


models = {"base": base, "MSE": copy.deepcopy(base), "self-perceptual": student}
for model, loss_of, steps in ((models["MSE"], mse, mse_steps), (student, self_perceptual, STEPS)):
    train_model(model, loss_of, steps, 1e-4, seed=1)

# %%
# Watch
# -----
# 15 steps of DDIM from the same noise.


@torch.no_grad()
def sample(model):
    scheduler.set_timesteps(15)
    x = torch.randn(SAMPLES, 48, FRAMES, 8, 8, generator=torch.Generator().manual_seed(2))
    for t in scheduler.timesteps:
        x = scheduler.step(model.eval()(x, t.expand(SAMPLES), **no_text(SAMPLES)).sample, t, x).prev_sample
    return to_clips(x)


samples = {name: sample(model) for name, model in models.items()}
Gif(samples)

# %%
# The first clip of each, frame by frame:

figure, axes = plt.subplots(4, figsize=(8, 5), layout="constrained")
for ax, (name, made) in zip(axes, {"held out": held_out, **samples}.items(), strict=True):
    ax.imshow(make_grid(made[0], nrow=FRAMES, pad_value=255).permute(1, 2, 0).numpy())
    ax.set_title(name, fontsize=10, loc="left")
    ax.axis("off")

# %%
# Measure
# -------
# Two figures that a blurred or a frozen clip fails: the mean change from a frame to the next, and the mean difference
# of neighbouring pixels, as a measure of sharpness. Both in parts of the range, to be compared with those of the real
# clips.

for name, made in {"training": train, "held out": held_out, **samples}.items():
    values = made.float() / 255
    motion, detail = values.diff(dim=1).abs().mean(), values.diff(dim=-1).abs().mean()
    print(f"{name:16} motion {motion:.4f}   detail {detail:.4f}")

# %%
# One shot and less than a minute of training: a blur of the one scene that the model knows, moving a little, by each
# of the three. That the objective runs on clips is what this page shows; whether clips get better by it is measured
# on the page :doc:`/evidence`, once its table of clips is there.
#
# The film: *Big Buck Bunny*, (c) copyright 2008, Blender Foundation, www.bigbuckbunny.org, licensed under CC BY 3.0;
# scaled down here.
