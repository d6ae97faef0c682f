"""Fine-tune Stable Diffusion XL through LoRA, with its sizes and crops, and its base as the teacher.

    accelerate launch --mixed_precision bf16 examples/sdxl.py --model MODEL --data PICTURES --out runs/sdxl
    python examples/sdxl.py --smoke --out runs/smoke      # tiny, offline, random weights, packaged emoji

MODEL is a directory of diffusers or a hub id, PICTURES a folder as image.py reads it. Each picture's size and crop go to
the model with the text (micro-conditioning), and to the teacher. Written to --out: samples from the same noise,
tensorboard/, checkpoints/ and lora/ (averaged), for `pipeline.load_lora_weights`.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import cast_training_params
from image import captioned
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageOps
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from perceptual_diffusion import Monitor, SelfPerceptualObjective, adapters
from perceptual_diffusion.cli.files import write_folder


def load(rows, size, seed, places):
    """Read the batch at these places of the run. They alone decide order, crop and drop, so that --resume is exact."""
    images, captions, ids = [], [], []
    for epoch, i in (divmod(place, len(rows)) for place in places):
        path, caption = rows[np.random.default_rng((seed, epoch)).permutation(len(rows))[i]]
        x, y, drop = np.random.default_rng((seed, epoch, i)).random(3)
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        wide = image.resize([max(size, round(size * side / min(image.size))) for side in image.size])
        left, top = round(x * (wide.width - size)), round(y * (wide.height - size))
        images.append(np.array(wide.crop((left, top, left + size, top + size))))
        ids.append([image.height, image.width, top, left, size, size])  # what the picture was, and what is seen of it
        captions.append("" if drop < 0.1 else caption)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1, captions, torch.tensor(ids)


def train(options, out, rows):
    accelerator = Accelerator(log_with="tensorboard", project_dir=out, gradient_accumulation_steps=options.accumulate)
    torch.manual_seed(options.seed + accelerator.process_index)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe = DiffusionPipeline.from_pretrained(options.model, use_safetensors=True).to(accelerator.device, dtype)
    if not isinstance(pipe, StableDiffusionXLPipeline):
        raise ValueError(f"{options.model!r} is a {type(pipe).__name__}, expected a StableDiffusionXLPipeline.")
    unet, vae, size = pipe.unet, pipe.vae.float(), pipe.unet.config.sample_size * pipe.vae_scale_factor
    lora = LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    unet.requires_grad_(False).add_adapter(lora)
    cast_training_params(unet)  # LoRA in float32, whatever the base is in
    recipe = {"seed": options.seed}
    objective = SelfPerceptualObjective.wrap(unet, pipe.scheduler, teacher="lora", **recipe)
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    trained = torch.nn.ParameterList(p for p in unet.parameters() if p.requires_grad)
    ema = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    model, optimizer = accelerator.prepare(unet.train(), torch.optim.AdamW(trained, lr=options.lr))
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())  # no base in checkpoints:
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())  # what is trained goes in by itself
    accelerator.init_trackers("tensorboard")
    monitor, both = Monitor(objective), torch.nn.ModuleList([trained, ema])
    source = "smoke" if options.smoke else f"model {options.model!r}, data {options.data!r}"
    about = f"{source}, batch {options.batch} x {options.accumulate}, seed {options.seed}, lr {options.lr}"
    checkpoints = adapters.Checkpoints(accelerator, out / "checkpoints", objective=objective, average=both, about=about)
    step = checkpoints.load() if options.resume else 0
    share = options.batch * accelerator.gradient_accumulation_steps * accelerator.num_processes
    places, read = range(step * share, options.steps * share), partial(load, rows, size, options.seed)
    workers = {"num_workers": 0 if options.smoke else 2, "generator": torch.Generator()}  # leaves torch's own alone
    loader = accelerator.prepare(DataLoader(places, options.batch, collate_fn=read, **workers))

    def swap():  # what is trained and its average
        for p, average in zip(trained, ema.module, strict=True):
            p.data, average.data = average.data, p.data

    def sample():
        settings = {"height": size, "width": size, "num_inference_steps": 3 if options.smoke else 25}
        prompts, generator = [caption for _, caption in rows[:4]], torch.Generator().manual_seed(options.seed)
        swap()
        latents = pipe(prompts, generator=generator, output_type="latent", **settings).images.float()
        swap()
        with torch.no_grad():  # the VAE stays in float32: in float16 it overflows
            images = pipe.image_processor.postprocess(vae.decode(latents / vae.config.scaling_factor).sample)
        Image.fromarray(np.hstack(images)).save(draft := out / "samples.tmp", "PNG")
        draft.replace(out / f"samples-{step:06d}.png")

    if accelerator.is_main_process and not step:
        sample()
    for pixels, captions, ids in tqdm(loader, desc="training", disable=not accelerator.is_main_process):
        with accelerator.accumulate(model):
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
                text, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
                kept = torch.tensor([[caption != ""] for caption in captions], device=text.device)  # without: zeros
                added = {"text_embeds": pooled * kept, "time_ids": ids}
                cond = {"encoder_hidden_states": text * kept[..., None], "added_cond_kwargs": added}
            with accelerator.autocast():
                loss = objective(model, latents, cond=cond)
            monitor.update()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.update_parameters(trained)
            step += 1
            if step % 10 == 0 or step == options.steps:
                with accelerator.autocast():
                    accelerator.log(monitor.pop() | monitor.features(latents, cond=cond), step)
            if step % options.every == 0 or step == options.steps:
                checkpoints.save(step)
                if accelerator.is_main_process:
                    sample()
    accelerator.end_training()
    swap()
    save = partial(pipe.save_lora_weights, unet_lora_layers=get_peft_model_state_dict(unet))
    accelerator.on_main_process(write_folder)(out / "lora", save)


def main(argv=None):
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__.splitlines()[0])
    numbers = {"steps": 1000, "batch": 1, "accumulate": 8, "lr": 1e-4, "every": 250, "seed": 0}
    for name, default in ({"model": "MODEL", "data": "PICTURES", "out": "runs/sdxl"} | numbers).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="by default %(default)s")
    for name in ("resume", "gradient-checkpointing", "smoke"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(argv)
    if options.smoke:
        from _tiny import smoke

        options = smoke(parser, argv, "sdxl")
    if Path(options.out, "checkpoints").exists() and not options.resume:
        parser.error(f"{options.out} holds a run. Add --resume to go on with it, or choose another --out.")
    try:
        train(options, Path(options.out), captioned(options.data, options.model))
    except torch.OutOfMemoryError:
        parser.error("out of memory: use --batch 1, --gradient-checkpointing, accelerate's `--mixed_precision bf16`.")
    except (OSError, ValueError) as error:
        parser.error(f"cannot train {options.model!r} on {options.data!r}: {error}")


if __name__ == "__main__":
    main()
