"""Fine-tune Stable Diffusion through LoRA, with the base under the LoRA layers as the teacher: the shortest LoRA example.

    accelerate launch --mixed_precision bf16 examples/lora.py --model MODEL --data PICTURES --out runs/lora
    python examples/lora.py --smoke --out runs/smoke      # tiny, offline, random weights, packaged emoji

MODEL and PICTURES are those of image.py. The frozen copy that the objective needs is in memory already: `teacher="lora"` shares
the base's weights, and the script prints how many bytes the teacher holds of its own. Written to --out: samples from the same
noise, tensorboard/, checkpoints/ and lora/, for `pipeline.load_lora_weights`.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from image import captioned, load
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from perceptual_diffusion import Monitor, SelfPerceptualObjective, adapters
from perceptual_diffusion.cli.files import write_folder


def train(options, out):
    accelerator = Accelerator(log_with="tensorboard", project_dir=out)
    torch.manual_seed(options.seed + accelerator.process_index)
    rows = captioned(options.data, options.model)
    pipe = DiffusionPipeline.from_pretrained(options.model, use_safetensors=True, safety_checker=None)
    if not isinstance(pipe.to(accelerator.device), StableDiffusionPipeline):
        raise ValueError(f"{options.model!r} is a {type(pipe).__name__}, expected a StableDiffusionPipeline.")
    unet, vae, size = pipe.unet, pipe.vae, pipe.unet.config.sample_size * pipe.vae_scale_factor
    base = sum(p.numel() * p.element_size() for p in unet.requires_grad_(False).parameters())
    unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    objective = SelfPerceptualObjective.wrap(unet, pipe.scheduler, teacher="lora", seed=options.seed)
    held = 4 * objective.teacher.parameters_held
    accelerator.print(f"the base holds {base:,} bytes of weights; beside them the teacher holds {held:,}")
    trained = torch.nn.ParameterList(p for p in unet.parameters() if p.requires_grad)
    model, optimizer = accelerator.prepare(unet.train(), torch.optim.AdamW(trained, lr=options.lr))
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())  # no base in checkpoints:
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())  # what is trained goes in by itself
    accelerator.init_trackers("tensorboard")
    monitor = Monitor(objective)
    source = "smoke" if options.smoke else f"model {options.model!r}, data {options.data!r}"
    about = f"{source}, batch {options.batch}, seed {options.seed}, lr {options.lr}"
    kept = {"objective": objective, "average": trained, "about": about}
    checkpoints = adapters.Checkpoints(accelerator, out / "checkpoints", **kept)
    step = checkpoints.load() if options.resume else 0
    share = options.batch * accelerator.num_processes
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
        with torch.no_grad():  # the VAE in float32: in half precision some overflow
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            cond = {"encoder_hidden_states": pipe.encode_prompt(captions, pixels.device, 1, False)[0]}
        with accelerator.autocast():
            loss = objective(model, latents, cond=cond)
        monitor.update()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0 or step == options.steps:
            with accelerator.autocast():
                accelerator.log(monitor.pop() | monitor.features(latents, cond=cond), step)
        if step % options.every == 0 or step == options.steps:
            checkpoints.save(step)
    accelerator.end_training()
    if accelerator.is_main_process:
        lora = get_peft_model_state_dict(unet)
        write_folder(out / "lora", lambda folder: pipe.save_lora_weights(folder, lora))
        unet.delete_adapters("default")
        pipe.load_lora_weights(out / "lora")  # as anyone will
        sample()


def main(argv=None):
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="MODEL", help="directory or hub id of a StableDiffusionPipeline")
    parser.add_argument("--data", default="PICTURES", help="folder of pictures with a metadata.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    for name, default in {"steps": 1000, "batch": 4, "lr": 1e-4, "every": 500, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="by default %(default)s")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(argv)
    if options.smoke:
        from _tiny import smoke

        options = smoke(parser, argv, "stable_diffusion")
    if (options.out / "checkpoints").exists() and not options.resume:
        parser.error(f"{options.out} holds a run. Add --resume to go on with it, or choose another --out.")
    try:
        train(options, options.out)
    except torch.OutOfMemoryError:
        parser.error("out of memory. Use a smaller --batch, or `accelerate launch --mixed_precision bf16`.")
    except (OSError, ValueError) as error:
        parser.error(f"cannot train {options.model!r} on {options.data!r}: {error}")


if __name__ == "__main__":
    main()
