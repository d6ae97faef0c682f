"""
Audio: drums, as frames of spectra
==================================

Sound is one-dimensional to the model: 32 frames, each with the levels of 128 frequencies as channels. diffusers'
``UNet1DModel`` learns 60 drum sounds, which are played below with what the model makes. Nothing is decoded for the
loss, and no network for sound is needed: the model's own copy compares.
"""

# sphinx_gallery_thumbnail_number = 2

import base64
import copy
import io
import wave
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet1DModel
from matplotlib import pyplot as plt

from perceptual_diffusion import SelfPerceptualObjective
from perceptual_diffusion.inspection import step_cost

BASE_STEPS, STEPS, BATCH, SAMPLES = 260, 40, 16, 16
# sphinx_gallery_start_ignore
import os  # noqa: E402

if os.environ.get("TUTORIALS_QUICK"):
    BASE_STEPS, STEPS, BATCH, SAMPLES = 3, 2, 4, 4
# sphinx_gallery_end_ignore

path = Path("data/drums.wav")
if not path.exists():
    raise SystemExit(f"{str(path)!r} is not here. Run this in the folder docs/tutorials of a clone.")
with wave.open(str(path)) as file:
    rate, data = file.getframerate(), file.readframes(-1)
sounds = torch.from_numpy(np.frombuffer(data, "<i2").astype("float32") / 32768).view(-1, 4096)
print(f"{len(sounds)} sounds of {sounds.shape[1] / rate:.2f} s at {rate} Hz")

# %%
# Sounds as spectra, and back
# ---------------------------
# The logarithm of the magnitude of a short-time Fourier transform, over four decades, as -1 to 1. The way back has to
# guess the phases (Griffin and Lim's way), which is heard: of each pair below, the first is the recording, the second
# went through spectra and back. No model of ours could sound better than that.

WINDOW, HOP = 256, 128
hann = torch.hann_window(WINDOW)


def transform(sound):
    return torch.stft(sound, WINDOW, HOP, window=hann, pad_mode="constant", return_complex=True)


def to_model(sound):
    """Turn sounds (B, 4096) into spectra (B, 128, 32) in [-1, 1]."""
    magnitude = transform(sound).abs()[:, :-1, :-1] * 4 / WINDOW
    return magnitude.clamp(1e-4, 1).log10() / 2 + 1


def to_sound(spectra, rounds=40):
    """Turn spectra into sounds, (B, 4096)."""
    magnitude = 10 ** (2 * (spectra.clamp(-1, 1) - 1)) * (spectra > -0.95) * WINDOW / 4
    magnitude = torch.nn.functional.pad(magnitude, (0, 1, 0, 1))
    angle = 2 * torch.pi * torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(rounds):
        sound = torch.istft(torch.polar(magnitude, angle), WINDOW, HOP, window=hann, length=4096)
        angle = transform(sound).angle()
    return sound


class Players:
    """HTML players of sounds, (N, 4096), a row for each name."""

    def __init__(self, rows):
        self.rows = rows

    def _repr_html_(self):
        return "".join(f"<p>{name}<br>{''.join(map(self.player, rows))}</p>" for name, rows in self.rows.items())

    def player(self, sound):
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            loud = 0.9 * sound / sound.abs().max().clamp(min=1e-4)
            file.writeframes((loud * 32767).numpy().astype("<i2").tobytes())
        source = base64.b64encode(buffer.getvalue()).decode()
        return f'<audio controls style="width: 7rem" src="data:audio/wav;base64,{source}"></audio> '


spectra = to_model(sounds)
shown = torch.linspace(0, len(sounds) - 1, 5).long().tolist()
Players({f"sound {i}": [sounds[i], to_sound(spectra[i : i + 1])[0]] for i in shown})

# %%
# One clip in ten is held out.

held_out, train = spectra[::10], spectra[torch.arange(len(spectra)) % 10 > 0]


def show(rows):
    """Draw rows of spectra, (N, 128, 32) each."""
    figure = plt.figure(figsize=(8, 1.4 * len(rows)), layout="constrained")
    for part, (name, x) in zip(figure.subfigures(len(rows), squeeze=False)[:, 0], rows.items(), strict=True):
        part.suptitle(name, x=0.01, ha="left", fontsize=10)
        axes = part.subplots(1, 8)
        for ax in axes:
            ax.axis("off")
        for ax, spectrum in zip(axes, x, strict=False):
            ax.imshow(spectrum.numpy(), origin="lower", aspect="auto", vmin=-1, vmax=1)


show({"training sounds: time to the right, 0 to 4 kHz upwards": train[::7]})

# %%
# The base
# --------
# It predicts the clean spectra (``sample``): 32 frames of 128 channels hardly fit through a narrow model as noise,
# and they need not. The schedule ends in noise alone (zero terminal SNR).

torch.manual_seed(0)
base = UNet1DModel(
    sample_size=32,
    in_channels=128,
    out_channels=128,
    extra_in_channels=64,
    block_out_channels=(64, 96),
    down_block_types=("DownBlock1DNoSkip", "AttnDownBlock1D"),
    mid_block_type="UNetMidBlock1D",
    up_block_types=("AttnUpBlock1D", "UpBlock1DNoSkip"),
    time_embedding_type="positional",
    use_timestep_embedding=False,
)
scheduler = DDIMScheduler(
    prediction_type="sample",
    beta_schedule="scaled_linear",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
    clip_sample=False,
)


def train_model(model, loss_of, steps, lr, *, seed):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    draws = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (steps - step) / (0.4 * steps))
        clean = train[torch.randint(0, len(train), (BATCH,), generator=draws)]
        noise = torch.randn(clean.shape, generator=draws)
        t = torch.randint(0, 1000, (BATCH,), generator=draws)
        clean_hat = model(scheduler.add_noise(clean, noise, t), t).sample
        loss = loss_of(clean_hat, clean, noise, t)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


def mse(clean_hat, clean, noise, t):
    return torch.nn.functional.mse_loss(clean_hat, clean)


print(f"{sum(p.numel() for p in base.parameters()):,} parameters; the spectra have a variance of {train.var():.3f}")
print(f"L_mse of the last of {BASE_STEPS} steps: {train_model(base, mse, BASE_STEPS, 2e-3, seed=0):.3f}")

# %%
# Fine-tune twice
# ---------------
# The objective knows this class and its middle. (B, C, L) needs no other setting than pictures do.

student = copy.deepcopy(base)
objective = SelfPerceptualObjective.wrap(student, scheduler, seed=0)
clean, t = train[:BATCH], torch.full((BATCH,), 500)
print(objective.check(student, clean))
cost = step_cost(base, lambda: base(clean, t).sample, objective.teacher.layers, sample=clean)
mse_steps = round(STEPS * cost.ratio)
print(f"a step costs {cost.ratio:.2f} x an MSE step: {STEPS} steps, and {mse_steps} with MSE")


def self_perceptual(clean_hat, clean, noise, t):
    return objective.loss(clean_hat, clean=clean, noise=noise, t=t)


models = {"base": base, "MSE": copy.deepcopy(base), "self-perceptual": student}
for model, loss_of, steps in ((models["MSE"], mse, mse_steps), (student, self_perceptual, STEPS)):
    train_model(model, loss_of, steps, 1e-4, seed=1)

# %%
# Listen
# ------
# 20 steps of DDIM from the same noise; a column of players is one noise.


@torch.no_grad()
def sample(model):
    scheduler.set_timesteps(20)
    x = torch.randn(SAMPLES, 128, 32, generator=torch.Generator().manual_seed(2))
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(SAMPLES)).sample, t, x).prev_sample
    return x


samples = {name: sample(model) for name, model in models.items()}
show(samples)

# %%
Players({name: to_sound(x[:4]) for name, x in samples.items()})

# %%
# Measure
# -------
# With so few sounds, a model may learn them by heart. So the distance of each sample to the nearest training sound is
# printed (root mean square over the spectrum), beside that of the held-out sounds, which are no copies; much below
# theirs would be copying. "Roughness" is the mean square of the difference from a frame to the next: too high is
# noise, too low is blur.


def nearest(x):
    return torch.cdist(x.flatten(1), train.flatten(1)).min(1).values.mean() / x[0].numel() ** 0.5


for name, x in {"training sounds": train, "held-out sounds": held_out, **samples}.items():
    near = "-" if x is train else f"{nearest(x):.3f}"
    print(f"{name:16} nearest {near:6} roughness {x.diff(dim=2).square().mean():.4f} variance {x.var():.3f}")

# %%
# These figures tell whether something is far off, not which model sounds better. When this page was written, the
# spectra after the objective had a grain of stripes between neighbouring frequencies and less variance than MSE's: by
# that look it did harm here, and more so with five times this learning rate. Fine detail is what the middle sees
# least of (see the tutorial on what the teacher sees), and this base is young. The table of sounds on the page
# :doc:`/evidence`, once it is there, is the measurement.
