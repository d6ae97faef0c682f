"""Fine-tune an EDM denoiser D(x, sigma) of pictures by the self-perceptual objective, beside EDM's own weighted loss.

    accelerate launch --mixed_precision bf16 examples/edm.py --out runs/edm --data pictures

--data is a folder of pictures, seen at 32 x 32; without it, the packaged emoji. Preconditioning, ln sigma ~ N(-1.2, 1.2^2), the
weight of the loss and Heun's sampler are those of Karras et al. 2022; the objective is one more term, of the same prediction.
The teacher is a copy of a model that EDM's loss trained: --model, the `base` of another run, or one that is trained here for
--base-steps. Writes `base` and `model` (averaged weights), their samples from the same noise, `logs`, and `state` for --resume.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from PIL import ImageOps
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm

from perceptual_diffusion import Monitor, SelfPerceptualObjective, adapters, schedules
from perceptual_diffusion.cli import datasets, files, folders

OPTIONS = {"model": "", "data": "", "base-steps": 20000, "steps": 1000, "batch": 64, "base-lr": 5e-4, "lr": 1e-4}
OPTIONS |= {"ema": 0.999, "seed": 0, "samples": 16, "sampling": 18, "every": 250}  # from checkpoint to checkpoint
SMOKE = {"base-steps": 4, "steps": 4, "batch": 4, "samples": 4, "every": 2, "sampling": 3}
BLIND = {"teacher": lambda x_t, t, cond: [0 * x_t]}  # sees nothing, and so leaves EDM's loss alone


class Denoiser(ModelMixin, ConfigMixin):
    """D(x, sigma) = c_skip x + c_out F(c_in x, sigma), F a UNet (Karras et al. 2022, eq. 7)."""

    @register_to_config
    def __init__(self, widths, sigma_data):
        super().__init__()
        self.unet = UNet2DModel(
            block_out_channels=widths, layers_per_block=1, down_block_types=["DownBlock2D"] * 2 + ["AttnDownBlock2D"],
            norm_num_groups=8, up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * 2,
        )  # fmt: skip

    def forward(self, x, sigma):
        wide, data = sigma.reshape(-1, 1, 1, 1), self.config.sigma_data
        total = (wide**2 + data**2).sqrt()
        output = self.unet(x / total, 100 * sigma.log()).sample  # 100: the UNet's sinusoids are made for 0 to 1000
        return (data / total) ** 2 * x + wide * data / total * output


def read(folder):
    """Read the pictures of a folder into memory, uint8, shape (N, 3, 32, 32), and name what cannot be used."""
    if not folder:
        return datasets.load("emoji").train.images
    found = folders.read(Path(folder), "nothing")
    if found.left_out:
        print(f"{len(found.left_out)} pictures are left out: {'; '.join(found.left_out)}", file=sys.stderr)
    pictures = [ImageOps.fit(folders.open_picture(item.path), (32, 32)) for item in found.items]
    return torch.stack([pil_to_tensor(picture) for picture in pictures])


def train(name, model, data, steps, lr, recipe, accelerator, options):
    """Train an MSE-trained or new model, from the newest checkpoint on, and write it and its samples."""
    model = model.to(accelerator.device).train()  # the teacher is a copy of it as it is now, before `prepare` wraps it
    objective = SelfPerceptualObjective.wrap(model, schedules.EDM(), mse_weight=0.0, seed=options.seed, **recipe)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
    student, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=lr))
    about = f"model {options.model!r}, data {options.data!r}, batch {options.batch}, seed {options.seed}"
    accelerator.on_main_process(files.claim)(options.out, about), accelerator.init_trackers(f"logs/{name}")
    kept = {"objective": objective, "average": average, "about": f"{about}, lr {lr}"}
    checkpoints = adapters.Checkpoints(accelerator, options.out / "state" / name, **kept)
    torch.manual_seed(options.seed + accelerator.process_index)  # of noise and sigma
    done, parts, monitor = checkpoints.load(), accelerator.gradient_accumulation_steps, Monitor(objective)
    order = torch.Generator().manual_seed(options.seed)  # a resumed run draws what it would have drawn
    order = torch.randint(len(data), (steps, accelerator.num_processes, parts, options.batch), generator=order)
    for step in tqdm(range(done + 1, steps + 1), name, steps, initial=done, disable=accelerator.process_index > 0):
        for index in order[step - 1, accelerator.process_index]:
            clean = data[index].to(accelerator.device) / 127.5 - 1
            noise, sigma = torch.randn_like(clean), (1.2 * torch.randn(len(clean), device=clean.device) - 1.2).exp()
            with accelerator.accumulate(student):
                denoised = student(objective.add_noise(clean, noise, sigma), sigma)
                weight = 1 / sigma**2 + 1 / model.config.sigma_data**2
                edm = (weight * (denoised - clean).square().mean((1, 2, 3))).mean()
                with accelerator.autocast():  # of the teacher: the student has its own, and EDM's weights need none
                    loss = objective.loss(denoised, clean=clean, noise=noise, t=sigma)
                accelerator.backward(edm + loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            monitor.update()
        average.update_parameters(model)
        if step % options.every == 0 or step == steps:
            with accelerator.autocast():
                accelerator.log(monitor.pop() | monitor.features(clean), step)
            checkpoints.save(step)
    accelerator.free_memory(), accelerator.trackers.clear()
    accelerator.on_main_process(write)(name, average.module.eval(), options)
    accelerator.wait_for_everyone()


@torch.no_grad()
def write(name, model, options):
    """Write a model, and what it makes from the noise of the seed by Heun's method (Karras et al. 2022, algorithm 1)."""
    places = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), options.sampling, device=model.device) ** 7
    x = 80 * torch.randn(options.samples, 3, 32, 32, generator=torch.manual_seed(options.seed)).to(model.device)
    for sigma, after in tqdm([*pairwise([*places, torch.zeros_like(places[0])])], "samples"):
        slope = (x - model(x, sigma.expand(len(x)))) / sigma
        ahead = x + (after - sigma) * slope
        if after > 0:
            slope = (slope + (ahead - model(ahead, after.expand(len(x)))) / after) / 2
        x = x + (after - sigma) * slope
    save_image(x, options.out / f"{name}.png", nrow=8, normalize=True, value_range=(-1, 1))
    files.write_folder(options.out / name, model.save_pretrained)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model")
    for name, default in (OPTIONS | (SMOKE if "--smoke" in (argv or sys.argv) else {})).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args(argv)
    if min(options.base_steps, options.steps, options.batch, options.samples, options.every) < 1:
        parser.error("--base-steps, --steps, --batch, --samples and --every must be at least 1.")
    if not options.resume and options.out.exists() and any(options.out.iterdir()):
        parser.error(f"`--out` {str(options.out)!r} is not empty. Give another folder, or --resume to go on.")
    accelerator = Accelerator(log_with="tensorboard", project_dir=options.out)
    torch.manual_seed(options.seed)
    given = base if (base := options.out / "base").exists() else options.model
    widths = (16, 32, 32) if options.smoke else (64, 128, 192)
    try:
        data = read(options.data)
        model = Denoiser.from_pretrained(given) if given else Denoiser(widths, float((data / 127.5 - 1).std()))
        if given != base:
            train("base", model, data, 0 if given else options.base_steps, options.base_lr, BLIND, accelerator, options)
            model = Denoiser.from_pretrained(base)
        train("model", model, data, options.steps, options.lr, {}, accelerator, options)
    except torch.OutOfMemoryError:
        parser.error("out of memory. Use a smaller --batch, with `accelerate launch --gradient_accumulation_steps N`.")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    accelerator.end_training()


if __name__ == "__main__":
    main()
