"""Stands in for train.py of facebookresearch/DiT at 70b9f00: its names, calls and order. Own code; `args` brings the parts."""
# ruff: noqa: I001, C408

from models import DiT_models
from diffusion import create_diffusion

import torch
from diffusers.models import AutoencoderKL


def main(args):
    device = "cpu"
    model = DiT_models[args.model]()
    diffusion = create_diffusion(timestep_respacing="")  # default: 1000 steps, linear noise schedule
    vae = AutoencoderKL.from_pretrained(f"stabilityai/sd-vae-ft-{args.vae}").to(device)
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0)
    model.train()
    for x, y in args.loader:
        with torch.no_grad():
            x = vae.encode(x).latent_dist.sample().mul_(0.18215)
        t = torch.randint(0, diffusion.num_timesteps, (x.shape[0],), device=device)
        model_kwargs = dict(y=y)
        loss_dict = diffusion.training_losses(model, x, t, model_kwargs)
        loss = loss_dict["loss"].mean()
        args.watch(locals())
        opt.zero_grad()
        loss.backward()
        opt.step()
