"""Three steps by Algorithm 1 (algorithm1.py), in one process, eager, by plain autograd."""

from contextlib import nullcontext
from functools import cache

import torch
from algorithm1 import algorithm1, freeze

from matrix.cells import Cell
from matrix.nets import STEPS, batch, build, setting


def autocast(cell):
    return torch.autocast("cpu", torch.bfloat16) if cell.precision == "bf16" else nullcontext()


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def update(before, after):
    return torch.cat([(after[name].double() - before[name].double()).flatten() for name in sorted(before)])


@cache
def reference(kind, lora, precision):
    """By Algorithm 1: the weights before, how training changes them, and the learning rate."""
    cell = Cell(
        "one process", "lora" if lora else "copy", compile="off" if kind == "unet" else "any", precision=precision
    )
    told = setting(kind)
    base, student = build(cell)
    frozen, before = freeze(base), {name: p.detach().clone() for name, p in trained(student).items()}
    rate = None if precision == "fp32" else reference(kind, lora, "fp32")[2]
    for step in range(STEPS):
        clean, noise, t, t_prime, cond = batch(kind, step)
        at_t, at_t_prime = told.scales(t), told.scales(t_prime)
        wide = (-1, *[1] * len(told.shape))
        x_t = at_t[0].float().view(wide) * clean + at_t[1].float().view(wide) * noise
        with autocast(cell):
            prediction = told.call(student, x_t, t, cond).float()
            loss = algorithm1(
                frozen, told.layers, told.call, cond, clean=clean, noise=noise, model_output=prediction,
                t_prime=t_prime, at_t=at_t, at_t_prime=at_t_prime, kind=told.kind,
            ).mean()  # fmt: skip
        loss.backward()
        weights = trained(student)
        if rate is None:  # three steps change the weights by about a tenth
            sizes = [
                sum(x.square().sum() for x in xs).sqrt()
                for xs in (weights.values(), (p.grad for p in weights.values()))
            ]
            rate = float(0.05 * sizes[0] / sizes[1])
        with torch.no_grad():
            for p in weights.values():
                p -= rate * p.grad
                p.grad = None
    return before, update(before, trained(student)), rate


def far(actual, expected):
    """Norm of the difference over the norm of what is expected."""
    return float((actual - expected).norm() / expected.norm())
