"""Stands in for `diffusion` of facebookresearch/DiT at 29e4fa6: what `create_diffusion` gives, as `training_losses` uses it.

Own code: ε with a learned variance between the posterior's and β (Nichol & Dhariwal 2021, eqs. 15 and 16), on the linear
schedule; KL of the posteriors in bits per dimension, without the decoder's term at t = 0.
"""

import enum
import math

import torch


class ModelMeanType(enum.Enum):
    START_X = 1
    EPSILON = 2


def at(table, t):
    return table[t].float().view(-1, 1, 1, 1)


class Diffusion:
    def __init__(self):
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        bar = (1 - betas).cumprod(0)
        before = torch.cat([bar.new_ones(1), bar[:-1]])
        self.betas, self.alphas_cumprod = betas.numpy(), bar.numpy()
        self.num_timesteps, self.model_mean_type = len(betas), ModelMeanType.EPSILON
        self.bar, self.beta, self.variance = bar, betas, betas * (1 - before) / (1 - bar)
        self.variance[0] = self.variance[1]
        self.of_clean, self.of_x_t = betas * before.sqrt() / (1 - bar), (1 - before) * (1 - betas).sqrt() / (1 - bar)

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        alpha, sigma = at(self.bar.sqrt(), t), at((1 - self.bar).sqrt(), t)
        x_t = alpha * x_start + sigma * noise
        output, values = model(x_t, t, **(model_kwargs or {})).chunk(2, 1)
        share = (values + 1) / 2
        log_variance = share * at(self.beta.log(), t) + (1 - share) * at(self.variance.log(), t)
        clean = (x_t - sigma * output.detach()) / alpha
        distance = (at(self.of_clean, t) * (x_start - clean)) ** 2
        true = at(self.variance.log(), t)
        kl = (log_variance - true + (true - log_variance).exp() + distance * (-log_variance).exp() - 1) / 2
        terms = {"vb": kl.flatten(1).mean(1) / math.log(2), "mse": ((noise - output) ** 2).flatten(1).mean(1)}
        return terms | {"loss": terms["mse"] + terms["vb"]}


def create_diffusion(timestep_respacing):
    assert timestep_respacing == ""
    return Diffusion()
