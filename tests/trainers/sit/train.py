"""Stands in for train.py of willisma/SiT at 947f95b: its names, calls and order. Own code; `args` brings the parts."""
# ruff: noqa: I001, C408

from models import SiT_models
from download import find_model
from transport import create_transport, Sampler

import torch
from diffusers.models import AutoencoderKL


def main(args):
    device = "cpu"
    model = SiT_models[args.model]()
    find_model(args.ckpt)
    transport = create_transport(
        args.path_type,
        args.prediction,
    )  # default: velocity;
    transport_sampler = Sampler(transport)
    vae = AutoencoderKL.from_pretrained(f"stabilityai/sd-vae-ft-{args.vae}").to(device)
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0)
    model.train()
    for x, y in args.loader:
        with torch.no_grad():
            x = vae.encode(x).latent_dist.sample().mul_(0.18215)
        model_kwargs = dict(y=y)
        loss_dict = transport.training_losses(model, x, model_kwargs)
        loss = loss_dict["loss"].mean()
        args.watch(locals())
        opt.zero_grad()
        loss.backward()
        opt.step()
    transport_sampler.sample_ode()
