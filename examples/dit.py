"""Fine-tune a class-conditional transformer (DiT, SiT), written here with timm's layers, by the self-perceptual objective.

    accelerate launch --mixed_precision bf16 examples/dit.py --out runs/dit --data pictures --guidance 2

--data: a subfolder of pictures for each class, or emoji. The teacher is a copy of --model, the MSE-trained `base` of another run, or
of one trained here for --base-steps. Writes `base`, `model` (averaged weights), their samples from the same noise, `logs`, `state`.
"""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from timm.layers import Attention, Mlp, PatchEmbed
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.utils import save_image
from tqdm import tqdm

from perceptual_diffusion import Monitor, SelfPerceptualObjective, adapters, schedules
from perceptual_diffusion.cli import datasets, files, folders

OPTIONS = {"model": "", "data": "", "base-steps": 40000, "steps": 1000, "batch": 64, "base-lr": 3e-4, "lr": 1e-4}
OPTIONS |= {"width": 256, "ema": 0.999, "seed": 0, "samples": 4, "sampling": 25, "guidance": 1.0, "every": 250}
SMOKE = {"base-steps": 4, "steps": 4, "batch": 4, "width": 32, "samples": 1, "sampling": 3, "every": 2}
BLIND = {"teacher": lambda x_t, t, cond: [0 * x_t]}  # sees nothing, and so leaves the MSE alone


class Block(nn.Module):
    """Attention and MLP, shifted, scaled and gated by time and class (adaLN-zero)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm, self.modulate = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 6 * width)
        self.attention, self.mlp = Attention(width, heads, qkv_bias=True), Mlp(width, 4 * width)
        nn.init.zeros_(self.modulate.weight), nn.init.zeros_(self.modulate.bias)

    def forward(self, x, c):
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulate(nn.functional.silu(c))[:, None].chunk(6, -1)
        x = x + gate * self.attention(self.norm(x) * (1 + scale) + shift)
        return x + gate_2 * self.mlp(self.norm(x) * (1 + scale_2) + shift_2)


class DiT(ModelMixin, ConfigMixin):
    """A diffusion transformer; the class after the last means none."""

    @register_to_config
    def __init__(self, classes, width, patch=2, depth=8, heads=4):
        super().__init__()
        self.embed = PatchEmbed(32, patch, 3, width)
        self.place = nn.Parameter(0.02 * torch.randn(1, self.embed.num_patches, width))
        self.condition = CombinedTimestepLabelEmbeddings(classes + 1, width, class_dropout_prob=0.0)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * patch**2))

    def forward(self, x_t, t, labels):
        x, c = self.embed(x_t) + self.place, self.condition(1000 * t, labels, hidden_dtype=x_t.dtype)
        for block in self.blocks:
            x = block(x, c)
        return nn.functional.pixel_shuffle(self.out(x).mT.unflatten(2, self.embed.grid_size), self.config.patch)


def train(name, model, data, steps, lr, recipe, accelerator, options):
    model = model.to(accelerator.device).train()  # the teacher is a copy of it as it is now, before `prepare` wraps it
    recipe = recipe | {"prediction": "flow_prediction", "seed": options.seed}
    objective = SelfPerceptualObjective.wrap(model, schedules.Linear(), **recipe)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema)).requires_grad_(False)
    student, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=lr))
    about = f"model {options.model!r}, data {options.data!r}, batch {options.batch}, seed {options.seed}"
    accelerator.on_main_process(files.claim)(options.out, about), accelerator.init_trackers(f"logs/{name}")
    kept = {"objective": objective, "average": average, "about": f"{about}, lr {lr}"}
    checkpoints = adapters.Checkpoints(accelerator, options.out / "state" / name, **kept)
    torch.manual_seed(options.seed + accelerator.process_index)  # of the classes left out
    done, parts, monitor = checkpoints.load(), accelerator.gradient_accumulation_steps, Monitor(objective)
    order = torch.Generator().manual_seed(options.seed)  # a resumed run draws what it would have drawn
    order = torch.randint(len(data.images), (steps, accelerator.num_processes, parts, options.batch), generator=order)
    for step in tqdm(range(done + 1, steps + 1), name, steps, initial=done, disable=accelerator.process_index > 0):
        for index in order[step - 1, accelerator.process_index]:
            clean = data.images[index].to(accelerator.device) / 127.5 - 1
            labels = data.labels[index].where(torch.rand(len(index)) > 0.1, len(data.classes)).to(accelerator.device)
            with accelerator.accumulate(student):
                with accelerator.autocast():  # of the teacher: the student has its own
                    loss = objective(student, clean, cond={"labels": labels})
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            monitor.update()
        average.update_parameters(model)
        if step % options.every == 0 or step == steps:
            with accelerator.autocast():
                accelerator.log(monitor.pop() | monitor.features(clean, cond={"labels": labels}), step)
            checkpoints.save(step)
    accelerator.free_memory(), accelerator.trackers.clear()
    accelerator.on_main_process(write)(name, average.module.eval(), options)
    accelerator.wait_for_everyone()


def write(name, model, options):
    """Write a model, and what it makes of each class from the noise of the seed, by Euler's method."""
    labels = torch.arange(model.config.classes).repeat(options.samples).to(model.device)
    labels = torch.cat([torch.full_like(labels, model.config.classes), labels])  # none, then each class
    x = torch.randn(len(labels) // 2, 3, 32, 32, generator=torch.manual_seed(options.seed)).to(model.device)
    for t in tqdm(torch.linspace(1, 0, options.sampling + 1)[:-1].to(model.device), "samples"):
        velocities = model(torch.cat([x, x]), t.expand(len(labels)), labels).chunk(2)
        x = x - torch.lerp(*velocities, options.guidance) / options.sampling
    save_image(x, options.out / f"{name}.png", nrow=model.config.classes, normalize=True, value_range=(-1, 1))
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
        data = datasets.load(options.data or "emoji").train
        broken = folders.find_broken(folders.pictures(Path(options.data))) if options.data else ()
        print(f"{len(data)} pictures; {len(broken)} broken, left out: {', '.join(map(str, broken))}", file=sys.stderr)
        model = DiT.from_pretrained(given) if given else DiT(len(data.classes), options.width)
        if model.config.classes != len(data.classes):
            raise ValueError(f"the model knows {model.config.classes} classes, and `--data` has {len(data.classes)}.")
        if given != base:
            train("base", model, data, 0 if given else options.base_steps, options.base_lr, BLIND, accelerator, options)
            model = DiT.from_pretrained(base)
        train("model", model, data, options.steps, options.lr, {}, accelerator, options)
    except torch.OutOfMemoryError:
        parser.error("out of memory. Use a smaller --batch, with `accelerate launch --gradient_accumulation_steps N`.")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    accelerator.end_training()


if __name__ == "__main__":
    main()
