"""Fine-tune Stable Diffusion 1.5 or 2.1 on captioned pictures with the self-perceptual objective and MSE.

    accelerate launch --mixed_precision bf16 examples/image.py --model MODEL --data PICTURES --out runs/image
    python examples/image.py --smoke --out runs/smoke      # tiny, offline, random weights, packaged emoji

MODEL is a directory of diffusers or a hub id, with MSE-trained weights: they are the teacher. PICTURES is a folder with a
metadata.jsonl of lines like {"file_name": "a.png", "text": "a cat"}. Written to --out: samples from the same noise, tensorboard/,
checkpoints/, and model/, the averaged pipeline. The paper's base, ByteDance's sd2.1-base-zsnr-laionaes6, needs no setting: its
scheduler_config.json says zero terminal SNR, v-prediction, trailing. `perceptual-diffusion sample` shows its -perceptual twin.
"""

import argparse
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image, ImageOps
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from perceptual_diffusion import Monitor, SelfPerceptualObjective, adapters
from perceptual_diffusion.cli import folders
from perceptual_diffusion.cli.files import write_folder


def captioned(folder, model):
    """Give (path, caption) of each picture that can be used, and name the others; a missing model is refused before that."""
    if not Path(model).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise ValueError(f"there is no folder {model!r}. Give a pipeline's folder, or its hub id.")
    found = folders.read(Path(folder), "captions")
    tqdm.write("\n".join([f"{len(found.items)} pictures; left out: {len(found.left_out)}", *found.left_out]))
    return [(str(item.path), item.text) for item in found.items]


def load(rows, size, seed, places):
    """Read the batch at these places of the run. They alone decide order, crop and drop, so that --resume is exact."""
    images, captions = [], []
    for epoch, i in (divmod(place, len(rows)) for place in places):
        path, caption = rows[np.random.default_rng((seed, epoch)).permutation(len(rows))[i]]
        x, y, drop = np.random.default_rng((seed, epoch, i)).random(3)
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        images.append(np.array(ImageOps.fit(image, (size, size), centering=(x, y))))
        captions.append("" if drop < 0.1 else caption)  # guidance needs the model to know "no caption"
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1, captions


def train(options, out):
    accelerator = Accelerator(log_with="tensorboard", project_dir=out, gradient_accumulation_steps=options.accumulate)
    torch.manual_seed(options.seed + accelerator.process_index)
    rows = captioned(options.data, options.model)
    pipe = DiffusionPipeline.from_pretrained(options.model, use_safetensors=True, safety_checker=None)
    if not isinstance(pipe.to(accelerator.device), StableDiffusionPipeline):
        raise ValueError(f"{options.model!r} is a {type(pipe).__name__}, expected a StableDiffusionPipeline.")
    unet, vae, size = pipe.unet, pipe.vae, pipe.unet.config.sample_size * pipe.vae_scale_factor
    objective = SelfPerceptualObjective.wrap(  # while the weights are the MSE-trained ones
        unet, pipe.scheduler, seed=options.seed
    )
    ema = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.999)).requires_grad_(False)
    pipe.unet = ema.module  # samples come from the averaged weights, and these are saved
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    model, optimizer = accelerator.prepare(unet.train(), torch.optim.AdamW(unet.parameters(), lr=options.lr))
    accelerator.init_trackers("tensorboard")
    monitor = Monitor(objective)
    source = "smoke" if options.smoke else f"model {options.model!r}, data {options.data!r}"
    about = f"{source}, batch {options.batch} x {options.accumulate}, seed {options.seed}, lr {options.lr}"
    checkpoints = adapters.Checkpoints(accelerator, out / "checkpoints", objective=objective, average=ema, about=about)
    step = checkpoints.load() if options.resume else 0
    share = options.batch * accelerator.gradient_accumulation_steps * accelerator.num_processes
    places, read = range(step * share, options.steps * share), partial(load, rows, size, options.seed)
    workers = {"num_workers": 0 if options.smoke else 2, "generator": torch.Generator()}  # leaves torch's own alone
    loader = accelerator.prepare(DataLoader(places, options.batch, collate_fn=read, **workers))

    def sample():
        prompts, steps = [caption for _, caption in rows[:8]], 3 if options.smoke else 25
        generator = torch.Generator().manual_seed(options.seed)
        images = pipe(prompts, size, size, steps, guidance_scale=1.0, generator=generator).images
        Image.fromarray(np.hstack(images)).save(draft := out / "samples.tmp", "PNG")
        draft.replace(out / f"samples-{step:06d}.png")

    if accelerator.is_main_process and not step:
        sample()
    for pixels, captions in tqdm(loader, desc="training", disable=not accelerator.is_main_process):
        with accelerator.accumulate(model):
            with torch.no_grad():  # the VAE in float32: in half precision some overflow
                latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
                cond = {"encoder_hidden_states": pipe.encode_prompt(captions, pixels.device, 1, False)[0]}
            with accelerator.autocast():
                loss = objective(model, latents, cond=cond)
            monitor.update()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.update_parameters(unet)
            step += 1
            if step % 10 == 0 or step == options.steps:
                with accelerator.autocast():
                    accelerator.log(monitor.pop() | monitor.features(latents, cond=cond), step)
            if step % options.every == 0 or step == options.steps:
                checkpoints.save(step)
                if accelerator.is_main_process:
                    sample()
    accelerator.end_training()
    accelerator.on_main_process(write_folder)(out / "model", pipe.save_pretrained)


def main(argv=None):
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="MODEL", help="directory or hub id of a StableDiffusionPipeline")
    parser.add_argument("--data", default="PICTURES", help="folder of pictures with a metadata.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    for name, default in {"steps": 10000, "batch": 8, "accumulate": 4, "lr": 1e-5, "every": 500, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="by default %(default)s")
    for name in ("resume", "gradient-checkpointing", "smoke"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(argv)
    if options.smoke:
        from _tiny import smoke

        options = smoke(parser, argv, "stable_diffusion")
    if (options.out / "checkpoints").exists() and not options.resume:
        parser.error(f"{options.out} holds a run. Add --resume to go on with it, or choose another --out.")
    try:
        train(options, options.out)
    except torch.OutOfMemoryError:
        parser.error(
            "out of memory. Use a smaller --batch and more --accumulate, --gradient-checkpointing, or lora.py."
        )
    except (OSError, ValueError) as error:
        parser.error(f"cannot train {options.model!r} on {options.data!r}: {error}")


if __name__ == "__main__":
    main()
