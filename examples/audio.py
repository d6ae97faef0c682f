"""Fine-tune a diffusion model of sounds by the self-perceptual objective: flow matching, crops of 0.73 s at 11 kHz.

    accelerate launch --mixed_precision bf16 examples/audio.py --out runs/sounds --data /usr/share/sonic-pi/samples

--data is a folder of sounds, such as Debian's package sonic-pi-samples (165, most of them CC0); without it, notes are made up.
The teacher is a copy of an MSE-trained model: --model, the `base` of another run, or a base that is trained here for --base-steps.
Writes `base` and `model` (averaged weights), base.wav and model.wav, samples from the same noise, with spectrograms; `logs`; `state`.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import soundfile
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from scipy.signal import resample_poly
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.utils import make_grid
from tqdm import tqdm

from perceptual_diffusion import Monitor, SelfPerceptualObjective, adapters
from perceptual_diffusion.cli import files

OPTIONS = {"model": "", "data": "", "base-steps": 20000, "steps": 1000, "batch": 32, "base-lr": 5e-4, "lr": 1e-4}
OPTIONS |= {"ema": 0.999, "seed": 0, "samples": 16, "sampling": 25, "every": 250}  # from checkpoint to checkpoint
SMOKE = {"base-steps": 4, "steps": 4, "batch": 4, "samples": 4, "every": 2, "sampling": 3}
RATE, LENGTH, SCHEDULER = 11025, 8064, FlowMatchEulerDiscreteScheduler()
STFT = {"n_fft": 256, "hop_length": 128, "window": torch.hann_window(256)}  # 128 frequencies x 64 frames
MODEL = {"sample_size": (32, 16), "in_channels": 32, "out_channels": 32, "layers_per_block": 1}
BLIND = {"teacher": lambda x_t, t, cond: [0 * x_t]}  # sees nothing, and so leaves the MSE alone


def read(folder):
    """Cut sounds into crops that overlap by half, in memory, float32 in [-1, 1], shape (N, 8064); name what cannot be used."""
    if not folder:
        time, pitch = torch.arange(LENGTH) / RATE, 110 * 2 ** (torch.arange(48) / 12)[:, None]
        return torch.sin(2 * torch.pi * pitch * time) * torch.exp(-6 * time)
    crops, left_out = [], []
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        try:
            sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
            sound = torch.tensor(resample_poly(sound.mean(1), RATE, rate))
            if len(sound) < RATE / 100 or sound.abs().max() < 1e-4:
                raise ValueError("shorter than 10 ms, or silent")
        except (soundfile.LibsndfileError, OSError, ValueError) as error:
            left_out.append(f"{path.name} ({error})")
        else:
            crops += pad(sound / sound.abs().max(), (0, -len(sound) % LENGTH)).unfold(0, LENGTH, LENGTH // 2)
    print(f"{len(crops)} crops; {len(left_out)} files are left out: {', '.join(left_out)}", file=sys.stderr)
    if not crops:
        raise ValueError(f"`--data` {folder!r} holds no sound that can be used. Give a folder with sounds in it.")
    return torch.stack(crops)


def to_model(sound):
    """Give sound, (B, 8064), as X / |X|^(2/3), X its transforms in time, real and imaginary, 4 x 4 folded: (B, 32, 32, 16)."""
    seen = torch.stft(sound, **STFT, return_complex=True)[:, :-1] / 64
    return 4 * pixel_unshuffle(torch.view_as_real(seen / seen.abs().clamp(min=1e-9) ** (2 / 3)).movedim(-1, 1), 4)


def to_sound(sample):
    """Undo `to_model`, but for the highest frequency."""
    parts = pixel_shuffle(sample, 4) / 4
    seen = torch.view_as_complex((64 * parts * parts.square().sum(1, keepdim=True)).movedim(1, -1).contiguous())
    return torch.istft(pad(seen, (0, 0, 0, 1)), **STFT)


def train(name, model, data, steps, lr, recipe, accelerator, options):
    model = model.to(accelerator.device).train()  # the teacher is a copy of it as it is now, before `prepare` wraps it
    objective = SelfPerceptualObjective.wrap(model, SCHEDULER, seed=options.seed, **recipe)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
    student, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=lr))
    about = f"model {options.model!r}, data {options.data!r}, batch {options.batch}, seed {options.seed}"
    accelerator.on_main_process(files.claim)(options.out, about), accelerator.init_trackers(f"logs/{name}")
    kept = {"objective": objective, "average": average, "about": f"{about}, lr {lr}"}
    checkpoints = adapters.Checkpoints(accelerator, options.out / "state" / name, **kept)
    done, parts, monitor = checkpoints.load(), accelerator.gradient_accumulation_steps, Monitor(objective)
    order = torch.Generator().manual_seed(options.seed)  # a resumed run draws what it would have drawn
    order = torch.randint(len(data), (steps, accelerator.num_processes, parts, options.batch), generator=order)
    for step in tqdm(range(done + 1, steps + 1), name, steps, initial=done, disable=accelerator.process_index > 0):
        for index in order[step - 1, accelerator.process_index]:
            clean = to_model(data[index]).to(accelerator.device)
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
    accelerator.on_main_process(write)(name, average.module.eval(), options)
    accelerator.wait_for_everyone()


@torch.no_grad()
def write(name, model, options):
    """Write a model, the sounds that it makes from the noise of the seed, and their spectrograms."""
    x = torch.randn(options.samples, 32, 32, 16, generator=torch.manual_seed(options.seed)).to(model.device)
    SCHEDULER.set_timesteps(options.sampling)
    for t in tqdm(SCHEDULER.timesteps, "samples"):
        x = SCHEDULER.step(model(x, t).sample, t, x).prev_sample
    soundfile.write(options.out / f"{name}.wav", to_sound(x.cpu()).clamp(-1, 1).flatten().numpy(), RATE)
    loud = make_grid(pixel_shuffle(x.cpu(), 4).norm(dim=1, keepdim=True).flip(2) / 4, pad_value=1)[0]
    plt.imsave(options.out / f"{name}.png", loud.numpy(), cmap="magma", vmin=0, vmax=1)
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
    widths = (32, 32, 32, 32) if options.smoke else (96, 128, 192, 192)
    try:
        model = UNet2DModel.from_pretrained(given) if given else UNet2DModel(block_out_channels=widths, **MODEL)
        data = read(options.data)
        if given != base:
            train("base", model, data, 0 if given else options.base_steps, options.base_lr, BLIND, accelerator, options)
            model = UNet2DModel.from_pretrained(base)
        train("model", model, data, options.steps, options.lr, {}, accelerator, options)
    except torch.OutOfMemoryError:
        parser.error("out of memory. Use a smaller --batch, with `accelerate launch --gradient_accumulation_steps N`.")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    accelerator.end_training()


if __name__ == "__main__":
    main()
