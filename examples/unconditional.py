"""Fine-tune an unconditional diffusion model of pictures (a DDPM) by the self-perceptual objective: no text, no classes.

    python examples/unconditional.py --out runs/mine --data pictures      # a folder; without --data, the packaged emoji
    accelerate launch --mixed_precision bf16 examples/unconditional.py --out runs/cats --data cats --model google/ddpm-cat-256

The teacher is a copy of the model, so the model has to be trained by MSE first: --model is such a diffusers pipeline (a
directory, or a hub id where there is a network); without it, a base is trained by MSE here, for --base-steps.
Writes into --out `base` and `model`, diffusers pipelines (averaged weights); base.png and model.png, samples from the same
noise; `logs` for tensorboard; and `state`, from which --resume goes on, in either training. --smoke: seconds, a tiny model.
Out of memory? A smaller --batch with `accelerate launch --gradient_accumulation_steps N`, and `micro_batch=1` below.
"""

import argparse
import io
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.utils import make_image_grid
from PIL import ImageOps
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from perceptual_diffusion import Monitor, SelfPerceptualObjective, adapters
from perceptual_diffusion.cli import datasets, files, folders

OPTIONS = {"model": "", "data": "", "base-steps": 20000, "steps": 1000, "batch": 64, "base-lr": 5e-4, "lr": 1e-4}
OPTIONS |= {"ema": 0.999, "seed": 0, "samples": 16, "sampling": 25, "every": 250}  # from checkpoint to checkpoint
SMOKE = {"base-steps": 4, "steps": 4, "batch": 4, "samples": 4, "every": 2, "sampling": 3}
BLIND = {"teacher": lambda x_t, t, cond: [0 * x_t]}  # sees nothing, and so leaves the MSE alone


def read(folder, size):
    """Read the pictures of a folder into memory, uint8, shape (N, 3, size, size), and name what cannot be used."""
    if not folder:
        return datasets.load("emoji").train.images
    found = folders.read(Path(folder), "nothing")
    if found.left_out:
        print(f"{len(found.left_out)} pictures are left out: {'; '.join(found.left_out)}", file=sys.stderr)
    pictures = [ImageOps.fit(folders.open_picture(item.path), (size, size)) for item in found.items]
    return torch.stack([pil_to_tensor(picture) for picture in pictures])


def build(smoke):
    """Make an untrained pipeline, with v-prediction and zero terminal SNR as in Lin & Yang."""
    unet = UNet2DModel(
        sample_size=32, block_out_channels=(16, 32, 32) if smoke else (64, 128, 192), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    kind = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return DDIMPipeline(unet, DDIMScheduler(clip_sample=False, **kind))


def train(name, pipeline, data, steps, lr, recipe, accelerator, options):
    """Train a pipeline, MSE-trained or new, from the newest checkpoint on, and write it and its samples."""
    model = pipeline.unet.to(
        accelerator.device
    ).train()  # the teacher is a copy as it is now, before `prepare` wraps it
    objective = SelfPerceptualObjective.wrap(model, pipeline.scheduler, seed=options.seed, **recipe)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
    student, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=lr))
    about = f"model {options.model!r}, data {options.data!r}, batch {options.batch}, seed {options.seed}"
    accelerator.on_main_process(files.claim)(options.out, about), accelerator.init_trackers(f"logs/{name}")
    monitor = Monitor(objective)
    kept = {"objective": objective, "average": average, "about": f"{about}, lr {lr}"}
    checkpoints = adapters.Checkpoints(accelerator, options.out / "state" / name, **kept)
    torch.manual_seed(options.seed + accelerator.process_index)  # dropout
    done, parts = checkpoints.load(), accelerator.gradient_accumulation_steps
    order = torch.Generator().manual_seed(options.seed)  # a resumed run draws what it would have drawn
    order = torch.randint(len(data), (steps, accelerator.num_processes, parts, options.batch), generator=order)
    for step in tqdm(range(done + 1, steps + 1), name, steps, initial=done, disable=accelerator.process_index > 0):
        for index in order[step - 1, accelerator.process_index]:
            clean = data[index].to(accelerator.device) / 127.5 - 1
            with accelerator.accumulate(student):
                with accelerator.autocast():  # of the teacher: the student has its own
                    loss = objective(student, clean)
                accelerator.backward(loss)
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
    if accelerator.is_main_process:
        pipeline.unet = average.module.eval()
        images = pipeline(options.samples, torch.manual_seed(options.seed), num_inference_steps=options.sampling).images
        make_image_grid(images, rows=1, cols=len(images)).save(file := io.BytesIO(), "PNG")
        files.write(options.out / f"{name}.png", file.getvalue())
        files.write_folder(options.out / name, pipeline.save_pretrained)
    accelerator.wait_for_everyone()


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
    try:
        pipeline = DDIMPipeline.from_pretrained(given) if given else build(options.smoke)
        data = read(options.data, pipeline.unet.config.sample_size)
        if given != base:
            train(
                "base", pipeline, data, 0 if given else options.base_steps, options.base_lr, BLIND, accelerator, options
            )
            pipeline = DDIMPipeline.from_pretrained(base)
        train("model", pipeline, data, options.steps, options.lr, {}, accelerator, options)
    except torch.OutOfMemoryError:
        parser.error("out of memory. Use a smaller --batch, with `accelerate launch --gradient_accumulation_steps N`.")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    accelerator.end_training()


if __name__ == "__main__":
    main()
