"""Fine-tune Stable Diffusion 3 or Flux, flow-matching transformers, through LoRA with the base as the teacher.

    accelerate launch --mixed_precision bf16 examples/sd3_flux.py --model MODEL --data PICTURES --out runs/sd3
    python examples/sd3_flux.py --smoke --out runs/smoke      # tiny, offline, random weights; Flux: --smoke --model flux

MODEL is a directory of diffusers or a hub id of either, PICTURES a folder as image.py reads it. Times are drawn logit-normal and
moved by the scheduler's shift. A Flux with a guidance embedding is trained and sampled at 3.5. Written to --out: samples from the
same noise, tensorboard/, checkpoints/, lora/ (averaged). With --full all weights train against a frozen copy; model/ is saved.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline
from diffusers.training_utils import cast_training_params
from image import captioned, load
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from perceptual_diffusion import Monitor, SelfPerceptualObjective, adapters, timesteps
from perceptual_diffusion.cli.files import write_folder


def train(options, out, rows):
    accelerator = Accelerator(log_with="tensorboard", project_dir=out, gradient_accumulation_steps=options.accumulate)
    torch.manual_seed(options.seed + accelerator.process_index)
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" and not options.full else torch.float32
    pipe = DiffusionPipeline.from_pretrained(options.model, use_safetensors=True).to(accelerator.device, dtype)
    if not isinstance(pipe, FluxPipeline | StableDiffusion3Pipeline):
        raise ValueError(f"{options.model!r} is a {type(pipe).__name__}, expected one of Stable Diffusion 3 or Flux.")
    net, vae, flux = pipe.transformer.requires_grad_(options.full), pipe.vae.float(), isinstance(pipe, FluxPipeline)
    if not options.full:
        net.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    cast_training_params(net)  # LoRA in float32, whatever the base is in
    size = options.size or pipe.default_sample_size * pipe.vae_scale_factor
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    t = timesteps.LogitNormal(shift=adapters.read(pipe.scheduler).t.shift)
    recipe = {"t": t, "seed": options.seed}
    objective = SelfPerceptualObjective.wrap(net, pipe.scheduler, teacher="copy" if options.full else "lora", **recipe)
    if options.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    trained = torch.nn.ParameterList(p for p in net.parameters() if p.requires_grad)
    ema = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    model, optimizer = accelerator.prepare(net.train(), torch.optim.AdamW(trained, lr=options.lr))
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())  # no base in checkpoints:
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())  # what is trained goes in by itself
    accelerator.init_trackers("tensorboard")
    monitor, both = Monitor(objective), torch.nn.ModuleList([trained, ema])
    source = "smoke" if options.smoke else f"model {options.model!r}, data {options.data!r}"
    about = f"{source}, size {size}, batch {options.batch} x {options.accumulate}, seed {options.seed}, lr {options.lr}"
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
        settings = {"num_inference_steps": 3 if options.smoke else 28, "max_sequence_length": options.tokens}
        settings |= {"height": size, "width": size, "guidance_scale": 3.5, "output_type": "latent"}
        prompts, generator = [caption for _, caption in rows[:4]], torch.Generator().manual_seed(options.seed)
        swap()
        latents = pipe(prompts, generator=generator, **settings).images.float()
        swap()
        latents = pipe._unpack_latents(latents, size, size, pipe.vae_scale_factor) if flux else latents
        with torch.no_grad():  # the VAE stays in float32: in half precision some overflow
            images = pipe.image_processor.postprocess(vae.decode(latents / scale + shift).sample)
        Image.fromarray(np.hstack(images)).save(draft := out / "samples.tmp", "PNG")
        draft.replace(out / f"samples-{step:06d}.png")

    def encode(pixels, captions):
        latents = (vae.encode(pixels).latent_dist.sample() - shift) * scale
        given = {"device": pixels.device, "max_sequence_length": options.tokens}
        if not flux:
            text, _, pooled, _ = pipe.encode_prompt(captions, None, None, do_classifier_free_guidance=False, **given)
            return latents, {"encoder_hidden_states": text, "pooled_projections": pooled}
        text, pooled, text_ids = pipe.encode_prompt(captions, None, **given)
        b, c, h, w = latents.shape
        cond = {"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": text_ids}
        cond["img_ids"] = pipe._prepare_latent_image_ids(b, h // 2, w // 2, pixels.device, text.dtype)
        if net.config.guidance_embeds:
            cond["guidance"] = torch.full((b,), 3.5, device=pixels.device)
        return pipe._pack_latents(latents, b, c, h, w), cond

    if accelerator.is_main_process and not step:
        sample()
    for pixels, captions in tqdm(loader, desc="training", disable=not accelerator.is_main_process):
        with accelerator.accumulate(model):
            with torch.no_grad():
                latents, cond = encode(pixels, captions)
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
    lora = None if options.full else get_peft_model_state_dict(net)
    save = pipe.save_pretrained if options.full else partial(pipe.save_lora_weights, transformer_lora_layers=lora)
    accelerator.on_main_process(write_folder)(out / ("model" if options.full else "lora"), save)


def main(argv=None):
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=__doc__.splitlines()[0])
    numbers = {"size": 0, "tokens": 256, "steps": 1000, "batch": 1, "accumulate": 8, "lr": 1e-4, "every": 250}
    for name, default in ({"model": "MODEL", "data": "PICTURES", "out": "runs/sd3", "seed": 0} | numbers).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="by default %(default)s")
    for name in ("resume", "full", "gradient-checkpointing", "smoke"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(argv)
    if options.smoke:
        from _tiny import smoke

        options = smoke(parser, argv, "flux" if options.model == "flux" else "sd3")
    if Path(options.out, "checkpoints").exists() and not options.resume:
        parser.error(f"{options.out} holds a run. Add --resume to go on with it, or choose another --out.")
    try:
        train(options, Path(options.out), captioned(options.data, options.model))
    except torch.OutOfMemoryError:
        parser.error("out of memory: use --batch 1, --gradient-checkpointing, a smaller --size, bf16, and no --full.")
    except (OSError, ValueError) as error:
        parser.error(f"cannot train {options.model!r} on {options.data!r}: {error}")


if __name__ == "__main__":
    main()
