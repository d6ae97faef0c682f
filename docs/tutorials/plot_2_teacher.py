"""
What the teacher sees
=====================

The objective compares hidden features of a frozen copy of the model. What these features do not answer to, the loss
does not forbid. Here one picture is changed by errors of one size at several spatial frequencies, and the middle of
the packaged UNet is asked how much it notices. Then a picture is mended by each loss, which shows what is left over.
"""

# sphinx_gallery_thumbnail_number = 2

from itertools import pairwise

import torch
from matplotlib import pyplot as plt
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from perceptual_diffusion import SelfPerceptualObjective, distances
from perceptual_diffusion.cli import datasets, demo

PICTURES, NOISES, STEPS = 8, 2, 60
# sphinx_gallery_start_ignore
import os  # noqa: E402

if os.environ.get("TUTORIALS_QUICK"):
    PICTURES, NOISES, STEPS = 2, 1, 2
# sphinx_gallery_end_ignore

emoji = datasets.load("emoji").held_out
base, scheduler = demo.load_base(classes=9)
objective = SelfPerceptualObjective.wrap(base, scheduler, seed=0)
print(f"the teacher gives the features of {', '.join(objective.teacher.layers)}")

index = torch.randperm(len(emoji), generator=torch.Generator().manual_seed(0))[:PICTURES]
clean, cond = datasets.to_model(emoji.images[index]), {"class_labels": emoji.labels[index]}

# %%
# Errors by spatial frequency
# ---------------------------
# White noise is cut into bands with a Fourier transform of the 32 x 32 pixels, and each part is scaled to the same
# root mean square. Frequencies are counted in cycles per picture: 16 is a period of two pixels.

EDGES = (0, 2, 4, 8, 16, 23)
BANDS = [f"{low} to {high}" for low, high in pairwise(EDGES)]
SIZE = 0.1
frequency = torch.fft.fftfreq(32, 1 / 32)
radius = torch.hypot(frequency[:, None], frequency[None])
inside = torch.stack([(radius > low) & (radius <= high) for low, high in pairwise(EDGES)])


def split(pixels):
    """Split pictures (B, 3, 32, 32) into parts of each band, (5, B, 3, 32, 32)."""
    return torch.fft.ifft2(torch.fft.fft2(pixels) * inside[:, None, None]).real


def sized(parts):
    return SIZE * parts / parts.square().mean((-3, -2, -1), keepdim=True).sqrt()


white = torch.randn(PICTURES, 3, 32, 32, generator=torch.Generator().manual_seed(1))
errors = sized(torch.cat([split(white), white[None]]))

picture = pixel_shuffle(clean, 2)[0]
figure, axes = plt.subplots(1, 6, figsize=(9, 1.9), layout="constrained")
figure.suptitle("the errors, four times enlarged, on one picture", fontsize=10)
for ax, error, name in zip(axes, errors[:, 0], [*BANDS, "white"], strict=True):
    ax.imshow(((picture + 4 * error).clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).numpy())
    ax.set_title(name, fontsize=9)
    ax.axis("off")

# %%
# How much the middle answers
# ---------------------------
# The picture is noised to t', with and without the error, and the teacher is run on both, as in eq. 12 of the paper.
# What is printed is the squared change of its features, over that by white noise of the same size: above 1 the
# teacher is more sensitive to these frequencies than to white noise, below 1 less.

TIMES = (50, 250, 500, 750, 950)


@torch.no_grad()
def answers(t_prime):
    found = torch.zeros(len(errors))
    for seed in range(NOISES):
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(10 + seed))
        t = torch.full((PICTURES,), t_prime)
        still = objective.teacher(objective.add_noise(clean, noise, t), t, cond)[0]
        for k, error in enumerate(errors):
            moved = objective.add_noise(clean + pixel_unshuffle(error, 2), noise, t)
            found[k] += distances.mse(objective.teacher(moved, t, cond)[0], still).mean()
    return found[:-1] / found[-1]


answer = torch.stack([answers(t) for t in TIMES])
print(f"{'t_prime':>8}", *(f"{band:>9}" for band in BANDS))
for t, row in zip(TIMES, answer, strict=True):
    print(f"{t:8}", *(f"{value:9.2f}" for value in row))
strongest, weakest = answer.mean(0).argmax(), answer.mean(0).argmin()
factor = answer.mean(0).max() / answer.mean(0).min()
print(f"most: {BANDS[strongest]}, least: {BANDS[weakest]}, by a factor of {factor:.0f}")

figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
for t, row in zip(TIMES, answer, strict=True):
    ax.plot(BANDS, row.numpy(), marker="o", label=f"t' = {t}")
ax.axhline(1, color="0.7", linestyle="--")
ax.set_yscale("log")
ax.set_xlabel("spatial frequency of the error, cycles per picture")
ax.set_ylabel("answer, over that to white noise")
ax.legend(fontsize=8, frameon=False, ncols=2)
ax.grid(axis="y", color="0.92")

# %%
# The coarse errors lie far above the line, the finest far below it, at every t'. Where t' is large this must be so,
# since the noise buries fine detail; where t' is small it need not, and that is the middle's own doing: it looks at
# what a picture shows, on a grid of 4 x 4. As a perceptual network that is what is wanted of it. As the only loss it
# is not: an error of the finest frequencies costs nearly nothing, though in pixels it is as large as the others.
#
# Mend a picture by each loss
# ---------------------------
# A student is free where its loss is flat. To see that without training a network, let the pictures themselves be
# what is learnt: they begin with an error in which every band has the same size, and Adam lowers the loss by changing
# the pixels. Noise and t' are new at each step, as in training. L_mse is the mean squared error of the pictures.

start = clean + pixel_unshuffle(sized(split(white)).sum(0), 2)


def mend(sp_weight, mse_weight, distance):
    learnt = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([learnt], lr=0.01)
    draws = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / STEPS)
        noise = torch.randn(clean.shape, generator=draws)
        t = torch.randint(0, 1000, (PICTURES,), generator=draws)
        loss = mse_weight * distances.mse(learnt, clean).mean()
        if sp_weight:
            with torch.no_grad():
                true = objective.teacher(objective.add_noise(clean, noise, t), t, cond)[0]
            predicted = objective.teacher(objective.add_noise(learnt, noise, t), t, cond)[0]
            loss = loss + sp_weight * distance(predicted, true).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return learnt.detach()


mended = {
    "L_mse": mend(0, 1, distances.mse),
    "L_sp": mend(1, 0, distances.mse),
    "L_sp, normalised": mend(1, 0, distances.normalised),
    "L_mse + L_sp, normalised": mend(1, 1, distances.normalised),
}
left = {name: split(pixel_shuffle(x - clean, 2)).square().mean((1, 2, 3, 4)) / SIZE**2 for name, x in mended.items()}
print("share of the error's energy that is left, by band")
print(f"{'':26}", *(f"{band:>9}" for band in BANDS))
for name, shares in left.items():
    print(f"{name:26}", *(f"{share:9.2f}" for share in shares))

# %%
figure, axes = plt.subplots(1, 6, figsize=(9, 2.3), layout="constrained")
shown = {"true": clean, "at the start": start, **mended}
for ax, (name, x) in zip(axes, shown.items(), strict=True):
    ax.imshow((pixel_shuffle(x, 2)[0].clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).numpy())
    ax.set_title(name.replace(", ", ",\n").replace("+ ", "+\n"), fontsize=8)
    ax.axis("off")

# %%
# L_sp alone takes away the coarse part of the error and leaves the fine part where it was, by either distance; with
# L_mse beside it, every band goes. So it is with a student: nothing in L_sp alone brings fine detail back once a step
# of the optimiser has moved it, and that adds up. It is one reason why the recipe keeps L_mse, and fits what was
# measured, where the objective alone made samples of this model worse
# (:doc:`/decisions/0007-the-recipe-of-the-demo`).
#
# What this does not show: a network is not as free as pixels are, its errors are not of equal size in every band, and
# a student is judged at its own t, by all that it predicts. Layers nearer to the input answer to finer detail
# (``layers=``), at their own price: :doc:`/layers`.
