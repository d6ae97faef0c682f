"""A small transformer and its objectives, and all that a call of one must leave as it was."""

import copy
import hashlib

import torch
from paper import PaperObjective
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from perceptual_diffusion import schedules

TEACHERS = ("copy", "lora", "module")
LAYER = "blocks.1"


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return x + self.dropout(self.down(torch.tanh(self.up(self.norm(x)))))


class Net(nn.Module):
    """Three blocks over tokens (B, N, 4); with `checkpointing` each recomputes itself."""

    def __init__(self, width=16, *, checkpointing=False):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.gradient_checkpointing = checkpointing

    def forward(self, x, t, mask=None):
        x = self.enter(x) + t.to(x.dtype)[:, None, None]
        x = x if mask is None else x + mask[..., None]
        for block in self.blocks:
            again = self.gradient_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return self.leave(x)


def build(teacher="copy", *, width=16, checkpointing=False, **options):
    """A model in train mode, and its objective; a module as teacher is a copy that checkpoints as the model does."""
    torch.manual_seed(0)
    model = Net(width, checkpointing=checkpointing)
    given = {"module": copy.deepcopy(model)}.get(teacher, teacher)
    if teacher == "lora":
        import peft

        model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up", "down"]), model)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                nn.init.normal_(parameter, std=0.1)
    defaults = {"prediction": "flow_prediction", "layers": [LAYER], "seed": 0, "teacher": given}
    defaults["call"] = lambda model, x, t, cond: model(x, t, **cond)
    return model.train(), PaperObjective.wrap(model, schedules.Linear(), **(defaults | options))


def batch(size=3, tokens=5):
    """Clean, noise and t."""
    generator = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn(size, tokens, 4, generator=generator) for _ in range(2))
    return clean, noise, torch.rand(size, generator=generator)


def predict(model, objective, data):
    """The student's prediction, with its dropout always the same."""
    clean, noise, t = data
    model.zero_grad()
    torch.manual_seed(5)
    return model(objective.add_noise(clean, noise, t), t)


def loss_of(objective, prediction, data, **options):
    clean, noise, t = data
    return objective.loss(prediction, clean=clean, noise=noise, t=t, **options)


def gradient(model, objective, data):
    """The gradient of a step, and the generator as it was before."""
    loss_of(objective, predict(model, objective, data), data).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def hooks(module):
    """How many hooks of any kind there are on each module and each parameter."""
    counts = {
        (name, table): len(hooks)
        for name, inner in module.named_modules()
        for table, hooks in vars(inner).items()
        if "hooks" in table and hooks
    }
    tensors = {
        name: len(p._post_accumulate_grad_hooks)
        for name, p in module.named_parameters()
        if p._post_accumulate_grad_hooks
    }
    return counts, tensors, len(nn.modules.module._global_forward_hooks)


def digest(module):
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


ADAPTER = ("_active_adapter", "_disable_adapters", "merged_adapters", "gradient_checkpointing", "training")


def state(model, objective):
    """All that a call must leave as it was, by name."""
    teacher = objective.teacher.module
    modules = [*model.modules(), *teacher.modules()]
    return {
        "grad mode": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "autocast nesting": (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "modes": (len(_get_current_function_mode_stack()), len(_get_current_dispatch_mode_stack())),
        "saved tensors": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "hooks": (hooks(model), hooks(teacher)),
        "modules": [[copy.copy(vars(module).get(name)) for name in ADAPTER] for module in modules],
        "forwards": ["forward" in vars(module) for module in modules],
        "requires grad": (
            [p.requires_grad for p in model.parameters()],
            {p.requires_grad for p in teacher.parameters()},
        ),
        "weights": digest(model),
        "teacher's weights": digest(teacher),
        "call": objective.teacher.call,
        "random": torch.get_rng_state().tolist(),
    }


def changed(before, after):
    """The names of what is no longer as it was."""
    return [name for name in before if before[name] != after[name]]
