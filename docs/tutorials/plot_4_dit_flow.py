"""
DiT: a transformer with flow matching
=====================================

A model that nobody registered, on a straight path from data to noise. Three things need care: the direction of time,
the sign of the velocity, and the layer, since a transformer has no bottleneck. ``check``, ``inspect`` and
``probe_layers`` look at them before any training.
"""

# sphinx_gallery_thumbnail_number = 2

import copy

import torch
from matplotlib import pyplot as plt
from torch import nn
from torchvision.utils import make_grid

from perceptual_diffusion import SelfPerceptualObjective, probe_layers, schedules
from perceptual_diffusion.checks import SetupError
from perceptual_diffusion.cli import datasets
from perceptual_diffusion.inspection import step_cost, trace

BASE_STEPS, STEPS, BATCH, SAMPLES, PROBED = 300, 40, 16, 32, 16
# sphinx_gallery_start_ignore
import os  # noqa: E402

if os.environ.get("TUTORIALS_QUICK"):
    BASE_STEPS, STEPS, BATCH, SAMPLES, PROBED = 5, 2, 4, 4, 4
# sphinx_gallery_end_ignore

emoji = datasets.load("emoji")


def pixels(pictures):
    """Take two classes, at half the size: (N, 3, 16, 16) in [-1, 1], and 0 for a face, 1 for a flag."""
    faces, flags = (pictures.classes.index(name) for name in ("Smileys & Emotion", "Flags"))
    kept = pictures.select((pictures.labels == faces) | (pictures.labels == flags))
    small = nn.functional.avg_pool2d(kept.images.float(), 2)
    return small / 127.5 - 1, (kept.labels == flags).long()


(train, train_labels), (held_out, held_out_labels) = pixels(emoji.train), pixels(emoji.held_out)
print(f"{len(train)} faces and flags to train on, {len(held_out)} held out")

# %%
# The model
# ---------
# Tokens of 2 x 2 pixels, adaptive layer norm from time and class, time in [0, 1].


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attend = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulate = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x, c):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulate(c)[:, None].chunk(6, -1)
        h = self.norm(x) * (1 + scale) + shift
        x = x + gate * self.attend(h, h, h, need_weights=False)[0]
        return x + gate_mlp * self.mlp(self.norm(x) * (1 + scale_mlp) + shift_mlp)


class DiT(nn.Module):
    def __init__(self, width=96, depth=6, classes=2):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.place = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.label = nn.Embedding(classes, width)
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 12))
        self.register_buffer("frequencies", torch.logspace(0, 2.5, 16))

    def forward(self, x_t, t, labels):
        angles = t.float()[:, None] * self.frequencies
        c = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.label(labels)
        x = self.patch(x_t).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = block(x, c)
        return nn.functional.pixel_shuffle(self.out(x).transpose(1, 2).unflatten(2, (8, 8)), 2)


torch.manual_seed(0)
base = DiT()
print(f"{sum(p.numel() for p in base.parameters()):,} parameters")

# %%
# Flow matching, and which way it goes
# ------------------------------------
# Here, as in SD3 and Flux, t = 1 is noise: x_t = (1 - t) clean + t noise, and the velocity is noise - clean. That is
# ``schedules.Linear()`` with ``flow_prediction``. SiT and the ``flow_matching`` library let t = 1 be data:
# ``schedules.Linear(reverse=True)``, and the velocity is clean - noise.

schedule = schedules.Linear()
alpha_t, sigma_t = schedule(torch.tensor([0.0, 0.25, 1.0]))
print("alpha", alpha_t.tolist(), "sigma", sigma_t.tolist())


def train_model(model, loss_of, steps, lr, *, seed):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99))
    draws = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))
        index = torch.randint(0, len(train), (BATCH,), generator=draws)
        clean, cond = train[index], {"labels": train_labels[index]}
        noise = torch.randn(clean.shape, generator=draws)
        t = torch.rand(BATCH, generator=draws)
        x_t = (1 - t[:, None, None, None]) * clean + t[:, None, None, None] * noise
        loss = loss_of(model(x_t, t, **cond), clean, noise, t, cond)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


def mse(velocity, clean, noise, t, cond):
    return nn.functional.mse_loss(velocity, noise - clean)


print(f"L_mse of the last of {BASE_STEPS} steps: {train_model(base, mse, BASE_STEPS, 2e-3, seed=0):.3f}")

# %%
# Had we declared the other direction, nothing would crash: shapes fit and a loss comes out. ``check`` tries the
# hypotheses on real data, and says which one fits.

clean, cond = train[:PROBED], {"labels": train_labels[:PROBED]}
student = copy.deepcopy(base)
wrong = SelfPerceptualObjective.wrap(student, schedules.Linear(reverse=True), prediction="flow_prediction", seed=0)
try:
    wrong.check(student, clean, cond=cond)
    print("not found")
except SetupError as error:
    print(f"{error.fault}: {error}")

# %%
# Which layer
# -----------
# The blocks in the order they run. ``perceptual-diffusion inspect`` prints this for a saved model, with the cost of a
# step.

x_t = torch.randn(PROBED, 3, 16, 16, generator=torch.Generator().manual_seed(4))
for block in trace(base, lambda: base(x_t, torch.full((PROBED,), 0.5), **cond), sample=x_t):
    print(f"{block.name:10} {block.kind:10} {block.shapes[0]!s:16} {block.flops_until:6.1%} of the forward done")

# %%
# ``wrap`` finds the middle of a model that it does not know by a general rule, here the list of equal blocks.
# ``layers=`` says otherwise.

objective = SelfPerceptualObjective.wrap(student, schedule, prediction="flow_prediction", seed=0)
print("the middle:", *objective.teacher.layers)
print(objective.check(student, clean, cond=cond))

# %%
# ``probe_layers`` measures what each layer answers to: "structure" is how much more it notices a blur, a shift, a
# hidden part or the model's own error than white noise of the same size.

probe = probe_layers(base, clean, schedule=schedule, prediction="flow_prediction", cond=cond, bands=2, draws=1)
names = [row.name for row in probe.rows]
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
left.plot(names, [row.structure for row in probe.rows], marker="o")
left.set_title("structure: answer to changes, over white noise", fontsize=10)
right.plot(names, [row.outlier for row in probe.rows], marker="o")
right.set_title("share of the energy in one channel", fontsize=10)
for ax in (left, right):
    ax.axvline(names.index(probe.middle[0]), color="0.85", linewidth=8, zorder=0)
    ax.tick_params(axis="x", rotation=45)
    ax.set_ylim(0)
print("by structure:", *probe.ranking)

# %%
# The grey bar is the middle. A layer that tells structure from noise lies well above 1. When this page was written,
# no block did: a model trained for half a minute is a weak judge, and says little about large transformers.
# :doc:`/layers` has what was measured on longer-trained models, and why a rank is no forecast of quality. A large
# share of the energy in one channel is what ``distance="normalised"`` is for.
#
# Fine-tune and look
# ------------------
# By the recipe, and with MSE for the same compute, on the same batches, noise and times.

t = torch.full((PROBED,), 0.5)
cost = step_cost(base, lambda: base(x_t, t, **cond), objective.teacher.layers, sample=x_t)
mse_steps = round(STEPS * cost.ratio)
print(f"a step costs {cost.ratio:.2f} x an MSE step: {STEPS} steps, and {mse_steps} with MSE")


def self_perceptual(velocity, clean, noise, t, cond):
    return objective.loss(velocity, clean=clean, noise=noise, t=t, cond=cond)


models = {"base": base, "MSE": copy.deepcopy(base), "self-perceptual": student}
for model, loss_of, steps in ((models["MSE"], mse, mse_steps), (student, self_perceptual, STEPS)):
    train_model(model, loss_of, steps, 1e-4, seed=1)


@torch.no_grad()
def sample(model, steps=25):
    """Follow the velocity from noise, t = 1, down to data, t = 0, by Euler's method."""
    x = torch.randn(SAMPLES, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(SAMPLES) % 2
    for step in range(steps):
        t = torch.full((SAMPLES,), 1 - step / steps)
        x = x - model(x, t, labels) / steps
    return x.clamp(-1, 1)


rows = {"real": train[torch.randperm(len(train), generator=torch.Generator().manual_seed(5))]}
rows |= {name: sample(model) for name, model in models.items()}
figure, axes = plt.subplots(len(rows), figsize=(8, 1.35 * len(rows)), layout="constrained")
for ax, (name, x) in zip(axes, rows.items(), strict=True):
    ax.imshow(
        make_grid(x[:32] / 2 + 0.5, nrow=16, padding=1, pad_value=1).permute(1, 2, 0).numpy(), interpolation="nearest"
    )
    ax.set_title(name, fontsize=10, loc="left")
    ax.axis("off")

# %%
# Discs and flags in turn, with the noise still in them: the base is far from done, and neither training was long
# enough to change that. The losses on held-out pictures, with the same noise and times, say what the two did; each is
# a difference to the base with its standard error over pictures.


@torch.no_grad()
def losses(model):
    draws = torch.Generator().manual_seed(3)
    noise = torch.randn(held_out.shape, generator=draws)
    t, t_prime = torch.rand(2, len(held_out), generator=draws)
    cond = {"labels": held_out_labels}
    velocity = model(objective.add_noise(held_out, noise, t), t, **cond)
    objective.loss(velocity, clean=held_out, noise=noise, t=t, t_prime=t_prime, cond=cond)
    return objective.terms


before = losses(base)
for name, model in models.items():
    changes = {term: value - before[term] for term, value in losses(model).items()}
    texts = [
        f"L_{term} {change.mean():+.4f} ± {change.std() / len(change) ** 0.5:.4f}" for term, change in changes.items()
    ]
    print(f"{name:16}", "   ".join(texts))
