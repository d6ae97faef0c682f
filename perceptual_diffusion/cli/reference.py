"""What the self-test of `doctor` runs and compares with: a small UNet and a small DiT of our own, and Algorithm 1 step by step.

Nothing but torch is needed, and of the package only the schedules are used, which the objective is given.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from perceptual_diffusion import schedules

STEPS = 1000


def _embed(t: Tensor, like: Tensor) -> Tensor:
    angles = t.to(like.dtype if like.dtype == torch.float64 else torch.float32)[:, None] * 2.0 ** torch.arange(
        4, device=t.device
    )
    return torch.cat([angles.sin(), angles.cos()], 1).to(like.dtype)


class _Model(nn.Module):
    """What both models share. `ended` grows when a pass goes beyond the layer that is compared."""

    layer = ""

    def __init__(self) -> None:
        super().__init__()
        self.checkpointing = False
        self.ended: list[bool] = []

    def block(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        """Run a part, checkpointed where that is on."""
        if self.checkpointing:
            return checkpoint(module, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return module(*inputs)  # type: ignore[no-any-return]


class UNet(_Model):
    """Convolutions, norms, a stride, a skip; it predicts v on a table of 1000 timesteps."""

    layer = "middle"
    prediction = "v_prediction"

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Linear(8, width)
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.GroupNorm(4, width), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU())
        self.last = nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Give the prediction, shape (B, 3, 8, 8), at timesteps t, shape (B,)."""
        skip = functional.silu(self.first(x) + self.time(_embed(t / STEPS, x))[:, :, None, None])
        middle = self.block(self.middle, self.block(self.down, skip))
        self.ended.append(True)
        up = functional.interpolate(middle, scale_factor=2.0)
        return self.last(torch.cat([up, skip], 1))  # type: ignore[no-any-return]

    @staticmethod
    def schedule() -> tuple[schedules.Schedule, Tensor, Tensor, Tensor]:
        """The schedule, and its timesteps with their scales, written out."""
        alpha_bar = (1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)).cumprod(0)
        return schedules.Discrete(alpha_bar), torch.arange(STEPS), alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


class _Block(nn.Module):
    """Attention and a perceptron, both shifted and scaled by the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulate = nn.Linear(width, 2 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        shift, scale = self.modulate(emb)[:, None].chunk(2, -1)
        seen = functional.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift
        q, k, v = self.qkv(seen).unflatten(-1, (6, -1)).transpose(1, 2).chunk(3, 1)
        h = h + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.mlp(functional.layer_norm(h, h.shape[-1:]))  # type: ignore[no-any-return]


class DiT(_Model):
    """Patches, attention, adaptive norms; it predicts the flow on the straight path."""

    layer = "blocks.0"
    prediction = "flow_prediction"

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.time, self.patch = nn.Linear(8, width), nn.Conv2d(3, width, 2, 2)
        self.place = nn.Parameter(torch.randn(16, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(2))
        self.last = nn.Linear(width, 12)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Give the prediction, shape (B, 3, 8, 8), at times t, shape (B,)."""
        emb = functional.silu(self.time(_embed(t, x)))
        h = self.patch(x).flatten(2).transpose(1, 2) + self.place
        h = self.block(self.blocks[0], h, emb)
        self.ended.append(True)
        h = self.block(self.blocks[1], h, emb)
        return functional.pixel_shuffle(self.last(h).transpose(1, 2).unflatten(2, (4, 4)), 2)

    @staticmethod
    def schedule() -> tuple[schedules.Schedule, Tensor, Tensor, Tensor]:
        """The schedule, and its times with their scales, written out."""
        t = torch.arange(1, STEPS + 1) / STEPS
        return schedules.Linear(), t, 1 - t.double(), t.double()


def algorithm1(
    student: Callable[..., Tensor], frozen: nn.Module, layer: str, kind: str, clean: Tensor, noise: Tensor,
    t: Tensor, t_prime: Tensor, scales: tuple[Tensor, ...],
) -> Tensor:  # fmt: skip
    """Give L_sp of each sample, shape (B,), by Lin & Yang's Algorithm 1, step by step, with nothing of the package."""
    alpha, sigma, alpha_tt, sigma_tt = (scale.view(-1, 1, 1, 1) for scale in scales)
    x_t = alpha * clean + sigma * noise
    y = student(x_t, t)
    if kind == "v_prediction":  # eqs. 8 and 9
        clean_hat, noise_hat = alpha * x_t - sigma * y, sigma * x_t + alpha * y
    else:  # y = ε − x_0 and x_t = (1 − t) x_0 + t ε
        clean_hat, noise_hat = x_t - sigma * y, x_t + alpha * y
    seen: list[Tensor] = []
    hook = frozen.get_submodule(layer).register_forward_hook(lambda module, given, out: seen.append(out))
    frozen(alpha_tt * clean_hat + sigma_tt * noise_hat, t_prime)
    with torch.no_grad():
        frozen(alpha_tt * clean + sigma_tt * noise, t_prime)
    hook.remove()
    return (seen[0] - seen[1]).square().flatten(1).mean(1)
