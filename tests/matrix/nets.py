"""The models that are trained, what Algorithm 1 has to know of them, and their batches."""

import copy
from functools import partial
from typing import NamedTuple

import torch
from models import conditional_unet
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

STEPS, BATCH = 3, 4
COND = torch.linspace(-1, 1, BATCH * 3 * 8).view(BATCH, 3, 8)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Blocks(nn.Module):
    """Four blocks over tokens (B, N, 8), with a time from 0 to 1 and a condition (B, 3, 8)."""

    def __init__(self):
        super().__init__()
        self.stem, self.text, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.use_checkpoint = self.reentrant = False

    def forward(self, x, t, text):
        x = self.stem(x) + self.text(text).mean(1, keepdim=True) + t.to(x.dtype).view(-1, 1, 1)
        for block in self.blocks:
            again = self.use_checkpoint and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=self.reentrant) if again else block(x)
        return self.head(x)


class Setting(NamedTuple):
    """What Algorithm 1 has to know of a model."""

    layers: list
    call: object
    kind: str
    shape: tuple
    times: torch.Tensor
    """Of every step, t and t', (STEPS, 2, BATCH)."""
    scales: object
    """(alpha, sigma) of times."""
    targets: list
    """Where LoRA layers go."""


def call_unet(model, x, t, cond):
    return model(x, t, encoder_hidden_states=cond["encoder_hidden_states"]).sample


def call_blocks(model, x, t, cond):
    return model(x, t, cond["encoder_hidden_states"])


def of_table(t):
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[t]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def setting(kind):
    drawn = torch.rand(STEPS, 2, BATCH, generator=torch.Generator().manual_seed(5))
    if kind == "blocks":
        return Setting(
            ["blocks.1"], call_blocks, "flow_prediction", (6, 8), 0.05 + 0.9 * drawn, lambda t: (1 - t, t), ["up", "down"]
        )  # fmt: skip
    times = (20 + 960 * drawn).long()
    return Setting(["mid_block"], call_unet, "epsilon", (4, 8, 8), times, of_table, ["to_q", "to_k", "to_v"])


def build(cell):
    """The base as it was trained, and the student: that, or with LoRA."""
    torch.manual_seed(0)
    if cell.kind == "blocks":
        base = Blocks()
    else:
        base = conditional_unet()
    student = copy.deepcopy(base)
    if cell.lora:
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=setting(cell.kind).targets, init_lora_weights=False)
        student.add_adapter(config) if cell.kind == "unet" else get_peft_model(student, config)
    reentrant = cell.checkpointing == "reentrant"
    for model in (base, student.train()) if cell.checkpointing != "off" else ():
        if cell.kind == "unet":
            model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))
        else:
            model.use_checkpoint, model.reentrant = True, reentrant
    return base, student


def batch(kind, step, part=slice(None)):
    """Clean, noise, t and t' of a step, and the condition; `part` of the samples."""
    told = setting(kind)
    clean, noise = torch.randn(2, BATCH, *told.shape, generator=torch.Generator().manual_seed(100 + step))
    t, t_prime = told.times[step]
    return clean[part], noise[part], t[part], t_prime[part], {"encoder_hidden_states": COND[part]}
