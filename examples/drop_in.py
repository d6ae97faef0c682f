"""Three lines turn a training loop into one with the self-perceptual loss; the loop keeps its noise, times and prediction.

    accelerate launch examples/drop_in.py --out runs/drop_in                    # the packaged model, on emoji
    accelerate launch examples/drop_in.py --model MODEL --data PICTURES --out DIR
    python examples/drop_in.py --smoke --out runs/smoke                         # four steps, on a CPU

The loop below is an MSE loop as people write it, on a small class-conditional UNet2DModel. Look for (1), (2) and (3). MODEL is
a folder as `model` in --out: a UNet2DModel and its scheduler, trained by MSE, for pictures as `datasets.to_model` gives them.
PICTURES is a folder with a subfolder for each of its classes. Written to --out: before.png and after.png, samples from the same
noise; `model`, the averaged weights; `logs` for tensorboard; and `checkpoints`, from which --resume goes on.
"""

import argparse
import sys
from importlib.resources import files as packaged
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, UNet2DModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from perceptual_diffusion import Monitor, SelfPerceptualObjective, adapters  # (1)
from perceptual_diffusion.cli import datasets, files, report

EVERY = 100
"""Steps between checkpoints, and between lines of the log."""


@torch.no_grad()
def sample(model, scheduler, noise, labels, steps):
    """Denoise by DDIM, and lay the pictures out in a grid."""
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t, labels).sample, t, x).prev_sample
    return report.png(datasets.to_images(x), columns=4)


def batches(pictures, size, seed, skip):
    """Give batches without end; those of the steps that are done are skipped."""
    place = 0
    while True:
        order = torch.Generator().manual_seed(seed + place)  # of each pass
        loader = DataLoader(TensorDataset(pictures.images, pictures.labels), size, shuffle=True, generator=order)
        for batch in loader:
            place += 1
            if place > skip:
                yield batch


def train(options):
    accelerator = Accelerator(log_with="tensorboard", project_dir=options.out)
    accelerator.init_trackers("logs")
    torch.manual_seed(options.seed + accelerator.process_index)  # each process its own noise
    pictures = datasets.load(options.data).train
    model = UNet2DModel.from_pretrained(options.model).to(accelerator.device)
    noise_scheduler = DDIMScheduler.from_pretrained(options.model)
    classes = model.config.num_class_embeds or 0
    if classes <= len(pictures.classes):  # the last class is "none"
        raise ValueError(
            f"the model has {classes - 1} classes, and --data {len(pictures.classes)}. Give other pictures."
        )

    drawn = torch.Generator().manual_seed(options.seed)
    noise = torch.randn(8, model.config.in_channels, *[model.config.sample_size] * 2, generator=drawn)
    start = noise.to(accelerator.device), pictures.labels[:8].to(accelerator.device), options.sampling
    if accelerator.is_main_process and not (options.out / "before.png").exists():
        files.write(options.out / "before.png", sample(model.eval(), noise_scheduler, *start))

    objective = SelfPerceptualObjective.wrap(model, noise_scheduler)  # (2)

    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
    student, optimizer = accelerator.prepare(model.train(), torch.optim.AdamW(model.parameters(), lr=options.lr))
    source = f"model {options.model!r}, data {options.data!r}"
    about = f"{source}, batch {options.batch}, seed {options.seed}, lr {options.lr}"
    kept = {"objective": objective, "average": average, "about": about}
    checkpoints = adapters.Checkpoints(accelerator, options.out / "checkpoints", **kept)
    done, monitor = checkpoints.load(), Monitor(objective)
    data = batches(pictures, options.batch, options.seed + 1000 * accelerator.process_index, done)
    for step in tqdm(
        range(done + 1, options.steps + 1), initial=done, total=options.steps, disable=not accelerator.is_main_process
    ):
        images, labels = (part.to(accelerator.device) for part in next(data))
        clean, cond = datasets.to_model(images), {"class_labels": labels}
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(clean),), device=clean.device)
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        model_pred = student(noisy, timesteps, labels).sample

        # before: loss = F.mse_loss(model_pred, noise_scheduler.get_velocity(clean, noise, timesteps))
        with accelerator.autocast():  # for the teacher in mixed precision: the student has its own
            loss = objective.loss(model_pred, clean=clean, noise=noise, t=timesteps, cond=cond)  # (3)

        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        monitor.update()
        if step % EVERY == 0 or step == options.steps:
            with accelerator.autocast():
                accelerator.log(monitor.pop() | monitor.features(clean, cond=cond), step)
            checkpoints.save(step)

    if accelerator.is_main_process:
        files.write(options.out / "after.png", sample(average.module.eval(), noise_scheduler, *start))
        files.write_folder(
            options.out / "model", lambda at: (average.module.save_pretrained(at), noise_scheduler.save_pretrained(at))
        )
    accelerator.end_training()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--model", default=str(packaged("perceptual_diffusion") / "assets/base"), help="folder of a model"
    )
    parser.add_argument("--data", default="emoji", help="folder of pictures, or 'emoji'")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--smoke", action="store_true", help="four steps")
    smoke = "--smoke" in (sys.argv[1:] if argv is None else argv)
    numbers = {"steps": 4 if smoke else 1000, "batch": 4 if smoke else 32, "sampling": 2 if smoke else 25, "seed": 0}
    for name, number in (numbers | {"lr": 1e-4, "ema": 0.999}).items():
        parser.add_argument(f"--{name}", type=type(number), default=number, help="by default %(default)s")
    options = parser.parse_args(argv)
    if min(options.steps, options.batch, options.sampling) < 1:
        parser.error("--steps, --batch and --sampling must be at least 1.")
    if not options.resume and options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out {str(options.out)!r} is not empty. Give another folder, or --resume to go on.")
    try:
        train(options)
    except (OSError, ValueError) as error:
        parser.error(str(error).split("\n")[0])


if __name__ == "__main__":
    main()
