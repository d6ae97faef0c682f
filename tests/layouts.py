"""Small models in every layout that a layer's output may have, with the noisy sample's part of it written by hand.

A case names a layer of a model and says how its raw output is taken apart: the features of each sample, (N, C) for tokens,
(C, *) for maps, (k, ...) with k frames. Nothing of the package is used for that.
"""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

B, N, M, C = 3, 6, 5, 8
"""Samples, noisy tokens, tokens of text, channels of the models."""

# --- models -----------------------------------------------------------------------------------------------------------


def by_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def by_grouped_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, ::2], v[:, ::2], enable_gqa=True)


def by_masked_sdpa(q, k, v):
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(q.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_sdpa_of_three_dims(q, k, v):
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    folded = (h.flatten(0, 1) for h in (q, k, v))
    return F.scaled_dot_product_attention(*folded, attn_mask=mask).unflatten(0, q.shape[:2])


def by_sdpa_with_scale(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=0.5)


def by_softmax(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def by_upcast_softmax(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).float().softmax(-1).to(v.dtype) @ v


def by_einsum(q, k, v):
    weights = torch.einsum("bhic,bhjc->bhij", q, k).mul(q.shape[-1] ** -0.5).softmax(dim=-1)
    return torch.einsum("bhij,bhjc->bhic", weights, v)


def by_einsum_with_heads_last(q, k, v):
    weights = torch.einsum("bhic,bhjc->bijh", q, k).mul(q.shape[-1] ** -0.5).softmax(dim=2)
    return torch.einsum("bijh,bhjc->bhic", weights, v)


def by_linear_attention(q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@torch.library.custom_op("layouts::attention", mutates_args=())
def own_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Stands for the kernels of other packages (flash-attn, xformers, sage), which torch knows by their names only."""
    return by_sdpa(q, k, v).clone()


def _backward(ctx, gradient):
    with torch.enable_grad():
        given = [value.detach().requires_grad_() for value in ctx.saved_tensors]
        return torch.autograd.grad(by_softmax(*given), given, gradient)


own_kernel.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def by_own_kernel(q, k, v):
    return own_kernel(q, k, v)


class Attention(nn.Module):
    """Of x (b, n, C) to itself, or to another sequence."""

    def __init__(self, kernel=by_sdpa):
        super().__init__()
        self.q, self.kv, self.out, self.kernel = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C), kernel

    def forward(self, x, other=None):
        q, (k, v) = self.q(x), self.kv(x if other is None else other).chunk(2, -1)
        mixed = self.kernel(*(h.unflatten(-1, (4, 2)).transpose(1, 2) for h in (q, k, v)))
        return self.out(mixed.transpose(1, 2).flatten(2))


class MultiHead(nn.Module):
    """torch's own attention, (b, n, C) or with the batch in dim 1."""

    def __init__(self, batch_first=True, need_weights=True):
        super().__init__()
        self.inner, self.need_weights = nn.MultiheadAttention(C, 4, batch_first=batch_first), need_weights

    def forward(self, x, other=None):
        other = x if other is None else other
        return self.inner(x, other, other, need_weights=self.need_weights)[0]


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention, self.mlp = attention, nn.Sequential(nn.Linear(C, 2 * C), nn.Tanh(), nn.Linear(2 * C, C))

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """One sequence of parts: of "noisy" (B, N, 3) and of the conditions (B, n, C); `order` says in which order.

    The blocks see (b, n, C), or with `dim=1` the batch in dim 1.
    """

    def __init__(self, order="text noisy", attention=Attention, dim=0, blocks=3):
        super().__init__()
        self.embed, self.order, self.dim = nn.Linear(3, C), order.split(), dim
        self.blocks = nn.ModuleList(Block(attention()) for _ in range(blocks))
        self.last = nn.Linear(C, C)

    def forward(self, x, t, **parts):
        parts["noisy"] = self.embed(x) + t.to(x.dtype)[:, None, None]
        parts["time"] = t.to(x.dtype)[:, None, None].expand(-1, 1, C)
        hidden = torch.cat([parts[name] for name in self.order], 1).transpose(0, self.dim)
        for block in self.blocks:
            hidden = block(hidden)
        return self.last(hidden)


class Encoder(nn.Module):
    """torch's own encoder, [text; image]."""

    def __init__(self, batch_first=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(C, 4, 2 * C, dropout=0.0, batch_first=batch_first)
        self.embed, self.dim = nn.Linear(3, C), 0 if batch_first else 1
        self.encoder, self.last = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(C, C)

    def forward(self, x, t, text):
        hidden = torch.cat([text, self.embed(x) + t.to(x.dtype)[:, None, None]], 1)
        return self.last(self.encoder(hidden.transpose(0, self.dim)))


Streams = namedtuple("Streams", ["first", "second"])


class DualBlock(nn.Module):
    """Image and text attend to both; `out` says what comes out."""

    def __init__(self, out, kernel=by_sdpa):
        super().__init__()
        self.see, self.read, self.out = Attention(kernel), Attention(kernel), out

    def forward(self, image, text):
        both = torch.cat([image, text], 1)
        return self.out(image + self.see(image, both), text + self.read(text, both))


OUT = {
    "image, text": (lambda image, text: (image, text), lambda out: out),
    "text, image": (lambda image, text: (text, image), lambda out: out[::-1]),
    "list": (lambda image, text: [text, image], lambda out: out[::-1]),
    "dict": (lambda image, text: {"text": text, "image": image}, lambda out: (out["image"], out["text"])),
    "named": (lambda image, text: Streams(text, image), lambda out: (out.second, out.first)),
    "with what is no stream": (
        lambda image, text: (None, text, torch.arange(3), image, "x"),
        lambda out: (out[3], out[1]),
    ),
}


class Dual(nn.Module):
    def __init__(self, out="image, text", kernel=by_sdpa):
        super().__init__()
        make, self.read = OUT[out]
        self.embed, self.blocks = nn.Linear(3, C), nn.ModuleList(DualBlock(make, kernel) for _ in range(3))

    def forward(self, x, t, text):
        image = self.embed(x) + t.to(x.dtype)[:, None, None]
        for block in self.blocks:
            image, text = self.read(block(image, text))
        return image


class CrossBlock(nn.Module):
    """The image attends to itself, then to the text."""

    def __init__(self, kernel=by_sdpa):
        super().__init__()
        self.itself, self.text = Attention(kernel), Attention(kernel)

    def forward(self, image, text):
        image = image + self.itself(image)
        return image + self.text(image, text)


class Cross(nn.Module):
    """Noisy tokens and references in one sequence, that look at a text of equal length in cross-attention."""

    def __init__(self, kernel=by_sdpa):
        super().__init__()
        self.embed = nn.Linear(3, C)
        self.blocks = nn.ModuleList(CrossBlock(kernel) for _ in range(3))

    def forward(self, x, t, text, reference):
        hidden = torch.cat([self.embed(x) + t.to(x.dtype)[:, None, None], reference], 1)
        for block in self.blocks:
            hidden = block(hidden, text)
        return hidden


class InPlace(nn.Module):
    """Mixes the tokens into what it is given."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(N + M, N + M)

    def forward(self, hidden):
        hidden += self.mix(hidden.mT).mT
        return hidden * 1.5


class Rounds(nn.Module):
    """[text; image] through blocks with numbers for names, the first of them twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Linear(3, C), nn.ModuleDict({"16": InPlace(), "8": InPlace()})

    def forward(self, x, t, text):
        hidden = torch.cat([text, self.embed(x) + t.to(x.dtype)[:, None, None]], 1)
        for name in ("16", "16", "8"):
            hidden = self.blocks[name](hidden)
        return hidden


class Whisper(nn.Module):
    """[text; image], where the text hears the image a million times more softly than itself."""

    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Linear(3, C), nn.Linear(C, C)

    def forward(self, x, t, text):
        image = self.embed(x) + t.to(x.dtype)[:, None, None]
        return self.last(torch.cat([text + 1e-7 * image.mean(1, keepdim=True), image], 1))


class Product(nn.Module):
    """Cross-attention by hand, then a product of matrices that is none: every token by the same one."""

    def __init__(self):
        super().__init__()
        self.embed, self.text, self.layer = nn.Linear(3, C), Attention(by_softmax), Taken()
        self.matrix = nn.Parameter(torch.randn(C, C))

    def forward(self, x, t, text, reference):
        hidden = torch.cat([self.embed(x) + t.to(x.dtype)[:, None, None], reference], 1)
        hidden = hidden + self.text(hidden, text)
        return self.layer(torch.bmm(hidden, self.matrix.expand(len(x), C, C)))


class TextSees(nn.Module):
    """A text that looks at the image in cross-attention, which does not look back."""

    def __init__(self, kernel=by_sdpa):
        super().__init__()
        self.embed, self.itself, self.image = nn.Linear(3, C), Attention(kernel), Attention(kernel)
        self.layer = Taken()

    def forward(self, x, t, text):
        image = self.embed(x) + t.to(x.dtype)[:, None, None]
        image = image + self.itself(image)
        return self.layer(image, text + self.image(text, image))


class Held(nn.Module):
    """Video (B, F, 3, H, W) behind a clean first frame, as maps (b f), with attention along time."""

    def __init__(self):
        super().__init__()
        self.embed, self.time, self.layer = nn.Conv2d(3, C, 1), Attention(), nn.Conv2d(C, C, 1)

    def forward(self, x, t, frame):
        b, f, _, h, w = x.shape
        video = torch.cat([frame, x + t.to(x.dtype).view(-1, 1, 1, 1, 1)], 1)
        hidden = torch.tanh(self.embed(video.flatten(0, 1)))
        pixels = hidden.unflatten(0, (b, f + 1)).permute(0, 3, 4, 1, 2).reshape(-1, f + 1, C)
        pixels = (pixels + self.time(pixels)).view(b, h, w, f + 1, C).permute(0, 3, 4, 1, 2)
        return self.layer(pixels.flatten(0, 1))


class Beside(nn.Module):
    """A clean reference to the right of a noisy map (B, 3, H, W), with attention along the width."""

    def __init__(self):
        super().__init__()
        self.embed, self.row, self.layer = nn.Conv2d(3, C, 1), Attention(), nn.Conv2d(C, C, 1)

    def forward(self, x, t, reference):
        hidden = torch.tanh(self.embed(torch.cat([x + t.to(x.dtype).view(-1, 1, 1, 1), reference], -1)))
        b, _, h, w = hidden.shape
        rows = hidden.permute(0, 2, 3, 1).flatten(0, 1)
        rows = rows + self.row(rows)
        return self.layer(rows.view(b, h, w, C).permute(0, 3, 1, 2))


class Sound(nn.Module):
    """Sound (B, 3, L) behind a token of the text, attention along L, channels in dim 1."""

    def __init__(self):
        super().__init__()
        self.embed, self.itself, self.layer = nn.Conv1d(3, C, 1), Attention(), nn.Conv1d(C, C, 1)

    def forward(self, x, t, text):
        hidden = torch.cat([text[:, :1].mT, self.embed(x) + t.to(x.dtype)[:, None, None]], -1)
        return self.layer(hidden + self.itself(hidden.mT).mT)


class Frames(nn.Module):
    """Video (B, 3, F, H, W) as maps of frames, (b f) or (f b)."""

    def __init__(self, frames_first=False):
        super().__init__()
        self.first, self.frames_first = nn.Conv2d(3, C, 3, padding=1), frames_first
        self.middle, self.time = nn.Conv2d(C, C, 3, padding=1), nn.Conv1d(C, C, 3, padding=1)

    def forward(self, x, t):
        b, f = x.shape[0], x.shape[2]
        maps = x.permute(2, 0, 1, 3, 4) if self.frames_first else x.permute(0, 2, 1, 3, 4)
        hidden = torch.tanh(self.first(maps.flatten(0, 1)))
        by_time = (
            hidden.unflatten(0, (f, b)).permute(1, 3, 4, 2, 0)
            if self.frames_first
            else hidden.unflatten(0, (b, f)).permute(0, 3, 4, 2, 1)
        )
        by_time = (
            by_time + self.time(by_time.reshape(-1, C, f)).view(by_time.shape) + t.to(x.dtype).view(-1, 1, 1, 1, 1)
        )
        back = by_time.permute(4, 0, 3, 1, 2) if self.frames_first else by_time.permute(0, 4, 3, 1, 2)
        return self.middle(back.flatten(0, 1))


class Taken(nn.Module):
    """A layer that gives what it is given."""

    def forward(self, *values):
        return values[0] if len(values) == 1 else values


class Tokens(nn.Module):
    """Attention over tokens (B, N, 3); `fold` gives a layer its layout, `unfold` takes it back."""

    def __init__(self, fold, unfold):
        super().__init__()
        self.embed, self.block, self.after = nn.Linear(3, C), Block(Attention()), Block(Attention())
        self.layer, self.fold, self.unfold = nn.Linear(C, C), fold, unfold

    def forward(self, x, t):
        hidden = self.block(self.embed(x) + t.to(x.dtype)[:, None, None])
        return self.after(self.unfold(self.layer(self.fold(hidden)), len(x)))


WINDOWS = (lambda h: h.unflatten(1, (2, -1)).flatten(0, 1), lambda h, b: h.unflatten(0, (b, -1)).flatten(1, 2))
COLUMNS = (
    lambda h: h.unflatten(1, (2, -1)).transpose(1, 2).flatten(0, 1),
    lambda h, b: h.unflatten(0, (b, -1)).transpose(1, 2).flatten(1, 2),
)


class Packed(nn.Module):
    """Rows of all samples in one sequence (n, C), attention within each sample; `order` places the text."""

    def __init__(self, order="noisy"):
        super().__init__()
        self.embed, self.order = nn.Linear(3, C), order
        self.blocks = nn.ModuleList(nn.ModuleDict({"attention": Attention(), "mlp": nn.Linear(C, C)}) for _ in range(2))
        self.layer = Taken()

    def forward(self, x, t, text=None):
        images = [self.embed(row) + at for row, at in zip(x, t.to(x[0].dtype), strict=True)]
        texts = [] if text is None else list(text)
        if self.order == "each":
            rows = [part for pair in zip(texts, images, strict=True) for part in pair]
        else:
            rows = [*texts, *images] if self.order == "text noisy" else [*images, *texts]
        sizes = [len(row) for row in rows]
        owner = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
        mask = owner[:, None] == owner[None]
        hidden = torch.cat(rows)
        for block in self.blocks:
            attention = block["attention"]
            q, (k, v) = attention.q(hidden), attention.kv(hidden).chunk(2, -1)
            q, k, v = (h.unflatten(-1, (4, 2)).transpose(0, 1)[None] for h in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1).flatten(1)
            hidden = hidden + attention.out(mixed)
            hidden = hidden + torch.tanh(block["mlp"](hidden))
        return self.layer(hidden)


class Maps(nn.Module):
    """Convolutions of maps (B, 3, *) in one to three dimensions."""

    def __init__(self, rank=2, channels_last=False, norm=False, dropout=0.0, width=C, wider=0):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.first, self.last = conv(3, width, 3, padding=1), conv(width + wider, 3, 3, padding=1)
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](width) if norm else nn.Identity()
        self.dropout, self.channels_last = nn.Dropout(dropout), channels_last
        self.middle = nn.Linear(width, width + wider) if channels_last else conv(width, width, 3, padding=1)

    def forward(self, x, t):
        hidden = torch.tanh(self.dropout(self.norm(self.first(x))) + t.to(x.dtype).view(-1, *[1] * (x.ndim - 1)))
        hidden = self.middle(hidden.movedim(1, -1)).movedim(-1, 1) if self.channels_last else self.middle(hidden)
        return self.last(hidden)


class Shifted(nn.Module):
    """A convolution of maps (B, 3, *), then a shift of each channel by a linear layer of the time."""

    def __init__(self, rank=2):
        super().__init__()
        self.conv, self.time = (nn.Conv1d, nn.Conv2d)[rank - 1](3, C, 3, padding=1), nn.Linear(1, C)
        self.layer = Taken()

    def forward(self, x, t):
        shift = self.time(t.to(x.dtype)[:, None])
        return self.layer(torch.tanh(self.conv(x)) + shift.reshape(len(x), C, *[1] * (x.ndim - 2)))


class Vectors(nn.Module):
    """Vectors (B, 3)."""

    def __init__(self, width=C):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)
        )
        self.score = nn.Linear(width, 1)
        self.scalar = Taken()

    def forward(self, x, t):
        hidden = self.net[1](self.net[0](x) + t.to(x.dtype)[:, None])
        self.scalar(self.score(hidden)[:, 0])
        return self.net[4](self.net[3](self.net[2](hidden)))


class TwoNoisy(nn.Module):
    """{"image": (B, N, 3), "sound": (B, 4, 3)}, both denoised, and a text."""

    def __init__(self):
        super().__init__()
        self.see, self.hear = nn.Linear(3, C), nn.Linear(3, C)
        self.blocks = nn.ModuleList(DualBlock(lambda a, b: (a, b)) for _ in range(2))
        self.joint = Block(Attention())
        self.layer = Taken()

    def forward(self, x, t, text):
        image, sound = self.see(x["image"]) + t[:, None, None], self.hear(x["sound"])
        for block in self.blocks:
            image, sound = block(image, sound)
        return self.layer(self.joint(torch.cat([sound, text, image], 1)))


class Halves(nn.Module):
    """{"image": (B, 6, 3), "sound": (B, 4, 3)}: the sound behind two tokens of the text is as long as the image."""

    def __init__(self):
        super().__init__()
        self.see, self.hear = nn.Linear(3, C), nn.Linear(3, C)
        self.blocks = nn.ModuleList(DualBlock(lambda a, b: (a, b)) for _ in range(2))

    def forward(self, x, t, text):
        sound = torch.cat([text[:, :2], self.hear(x["sound"])], 1)
        image = self.see(x["image"]) + t[:, None, None]
        for block in self.blocks:
            sound, image = block(sound, image)
        return image


class Shared(nn.Module):
    """One block, run three times."""

    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Linear(3, C), Block(Attention())

    def forward(self, x, t, text):
        hidden = torch.cat([text, self.embed(x) + t.to(x.dtype)[:, None, None]], 1)
        for _ in range(3):
            hidden = self.block(hidden)
        return hidden


class Stages(nn.Module):
    """Lists of lists of blocks, by number or by a name that is a number."""

    def __init__(self, by_number=False):
        super().__init__()
        stages = [nn.ModuleList(Block(Attention()) for _ in range(2)) for _ in range(2)]
        self.embed = nn.Linear(3, C)
        self.stages = nn.ModuleDict({"16": stages[0], "8": stages[1]}) if by_number else nn.ModuleList(stages)

    def forward(self, x, t, text):
        hidden = torch.cat([text, self.embed(x) + t.to(x.dtype)[:, None, None]], 1)
        for stage in self.stages.values() if isinstance(self.stages, nn.ModuleDict) else self.stages:
            for block in stage:
                hidden = block(hidden)
        return hidden


class Pyramid(nn.Module):
    """Convolutions in a dict whose keys are numbers, as resolutions are."""

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleDict({"16": nn.Conv2d(3, C, 3, padding=1), "8": nn.Conv2d(C, C, 3, padding=1)})

    def forward(self, x, t):
        return self.levels["8"](torch.tanh(self.levels["16"](x) + t.to(x.dtype).view(-1, 1, 1, 1)))


class Interleaved(nn.Module):
    """A token of the image and one of the text in turns."""

    def __init__(self):
        super().__init__()
        self.embed, self.block, self.last = nn.Linear(3, C), Block(Attention()), nn.Linear(C, C)

    def forward(self, x, t, text):
        both = torch.stack([self.embed(x) + t.to(x.dtype)[:, None, None], text], 2).flatten(1, 2)
        return self.last(self.block(both))


class Experts(nn.Module):
    """A mixture: each token goes to the expert that likes it most, all tokens of an expert at once."""

    def __init__(self):
        super().__init__()
        self.route, self.experts = nn.Linear(C, 3), nn.ModuleList(nn.Linear(C, C) for _ in range(3))

    def forward(self, x):
        rows, weights = x.flatten(0, 1), self.route(x).softmax(-1).flatten(0, 1)
        best, out = weights.argmax(-1), torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            (own,) = (best == i).nonzero(as_tuple=True)
            out = out.index_copy(0, own, expert(rows[own]) * weights[own, i : i + 1])
        return x + out.view(x.shape)


class Mixture(nn.Module):
    """[text; image] through mixtures of experts."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.last = nn.Linear(3, C), Attention(), nn.Linear(C, C)
        self.first, self.second = Experts(), Experts()

    def forward(self, x, t, text):
        hidden = torch.cat([text, self.embed(x) + t.to(x.dtype)[:, None, None]], 1)
        hidden = self.first(hidden)
        return self.last(self.second(hidden + self.attention(hidden)))


class Mixer(nn.Module):
    """Tokens mixed by a linear layer along them, or by a recurrence."""

    def __init__(self, recurrent, order):
        super().__init__()
        self.embed, self.order = nn.Linear(3, C), order
        make = (lambda: nn.GRU(C, C, batch_first=True)) if recurrent else (lambda: nn.Linear(N + M, N + M))
        self.blocks = nn.ModuleList(nn.ModuleList([make(), nn.Linear(C, C)]) for _ in range(3))
        self.layers = nn.ModuleList(Taken() for _ in range(3))
        self.recurrent = recurrent

    def forward(self, x, t, text):
        parts = {"noisy": self.embed(x) + t.to(x.dtype)[:, None, None], "text": text}
        hidden = torch.cat([parts[name] for name in self.order.split()], 1)
        for (mix, linear), layer in zip(self.blocks, self.layers, strict=True):
            hidden = layer(hidden)
            hidden = hidden + (mix(hidden)[0] if self.recurrent else mix(hidden.mT).mT)
            hidden = hidden + torch.tanh(linear(hidden))
        return hidden


# --- cases ------------------------------------------------------------------------------------------------------------


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


TEXT, EQUAL = {"text": normal(B, M, C)}, {"text": normal(B, N, C)}
TOKENS = normal(B, N, 3)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer of a model.

    Attributes:
        make: builds the model.
        layer: the layer's name.
        take: takes its raw output apart: for each feature the parts of the B samples.
        channel: the dimension of the channels in one of those.
        x: the noisy sample.
        cond: the model's conditions, batch first.
    """

    make: Callable[[], nn.Module]
    layer: str
    take: Callable[[Any], list]
    channel: int = -1
    x: Any = TOKENS
    cond: dict = field(default_factory=dict)


def whole(out):
    return [list(out)]


def tokens(start=0, stop=None):
    return lambda out: [list(out[:, start:stop])]


def tokens_of_dim_1(start=0, stop=None):
    return lambda out: [list(out.transpose(0, 1)[:, start:stop])]


def frames(out):
    return [list(out.unflatten(0, (B, -1)))]


def alternating(out):
    return [list(out.unflatten(0, (-1, B)).transpose(0, 1))]


def rows(*sizes, start=0):
    """Rows (n, C) of samples of these sizes, one sample after another."""
    return lambda out: [list(out[start : start + sum(sizes)].split(list(sizes)))]


def image_of(name):
    return lambda out: [list(OUT[name][1](out)[0])]


def sequence_first(order, **more):
    def make():
        return Transformer(order, attention=lambda: MultiHead(batch_first=False), dim=1)

    return Case(make=make, **more)


def with_kernel(kernel, layer="last", **more):
    return Case(make=lambda: Transformer(attention=lambda: Attention(kernel)), layer=layer, take=tokens(M), cond=TEXT)


def video(layer="middle", size=4, frames_first=False):
    take = alternating if frames_first else frames
    x = normal(B, 3, size, 5, 6)
    return Case(make=lambda: Frames(frames_first), layer=layer, x=x, take=take, channel=1)


def packed(order, take, lengths=(N,) * B, cond=TEXT):
    x = [normal(n, 3, seed=i) for i, n in enumerate(lengths)]
    return Case(make=lambda: Packed(order), layer="layer", x=x, take=take, cond=cond)


FRAME = normal(B, 1, 3, 2, 5)
UNEVEN = (4, 5, 3)
"""Lengths of which the first is the mean."""

CASES = {
    # one sequence
    "joint": Case(make=Transformer, layer="blocks.1", take=tokens(M), cond=TEXT),
    "joint, image first": Case(make=lambda: Transformer("noisy text"), layer="blocks.1", take=tokens(0, N), cond=TEXT),
    "joint, one block": Case(make=lambda: Transformer(blocks=1), layer="blocks.0", take=tokens(M), cond=TEXT),
    "joint, behind the blocks": Case(make=Transformer, layer="last", take=tokens(M), cond=TEXT),
    "joint, the branch of a block": Case(make=Transformer, layer="blocks.1.mlp", take=tokens(M), cond=TEXT),
    "joint, the attention of a block": Case(make=Transformer, layer="blocks.1.attention", take=tokens(M), cond=TEXT),
    "joint, a part of the attention": Case(make=Transformer, layer="blocks.1.attention.out", take=tokens(M), cond=TEXT),
    "time, text, image, reference": Case(
        make=lambda: Transformer("time text noisy reference"), layer="blocks.1", take=tokens(1 + M, 1 + M + N),
        cond=TEXT | {"reference": normal(B, N, C, seed=1)},
    ),
    "registers in front": Case(
        make=lambda: Transformer("registers noisy"), layer="blocks.2", take=tokens(4),
        cond={"registers": normal(B, 4, C)},
    ),
    "the image between and around": Case(
        make=Interleaved, layer="last", cond={"text": normal(B, N, C)}, take=lambda out: [list(out[:, ::2])]
    ),
    "as many tokens as samples": Case(
        make=Transformer, layer="last", take=tokens(B), x=normal(B, B, 3), cond={"text": normal(B, B, C)}
    ),
    "one noisy token": Case(
        make=lambda: Transformer("text noisy text"), layer="last", take=tokens(M, M + 1), x=normal(B, 1, 3), cond=TEXT
    ),
    "batch in dim 1": sequence_first("text noisy", layer="blocks.1", take=tokens_of_dim_1(M), cond=TEXT),
    "batch in dim 1, image only": sequence_first("noisy", layer="blocks.1", take=tokens_of_dim_1()),
    "batch in dim 1, as many tokens as samples": sequence_first(
        "noisy", layer="last", take=tokens_of_dim_1(), x=normal(B, B, 3)
    ),
    # kinds of attention
    "grouped heads": with_kernel(by_grouped_sdpa),
    "a mask": with_kernel(by_masked_sdpa),
    "heads folded into the batch": with_kernel(by_sdpa_of_three_dims),
    "a scale": with_kernel(by_sdpa_with_scale),
    "softmax": with_kernel(by_softmax),
    "einsum": with_kernel(by_einsum),
    "einsum, heads last": with_kernel(by_einsum_with_heads_last),
    "einsum, heads last, in the list": with_kernel(by_einsum_with_heads_last, layer="blocks.2"),
    "a kernel of another package": with_kernel(by_own_kernel),
    "a kernel of another package, in the list": with_kernel(by_own_kernel, layer="blocks.2"),
    "linear attention, in the list": with_kernel(by_linear_attention, layer="blocks.2"),
    "MultiheadAttention": Case(
        make=lambda: Transformer(attention=MultiHead), layer="last", take=tokens(M), cond=TEXT
    ),
    "MultiheadAttention without weights": Case(
        make=lambda: Transformer(attention=lambda: MultiHead(need_weights=False)), layer="last", take=tokens(M),
        cond=TEXT,
    ),
    "TransformerEncoder": Case(make=Encoder, layer="encoder.layers.1", take=tokens(M), cond=TEXT),
    "TransformerEncoder, behind it": Case(make=Encoder, layer="last", take=tokens(M), cond=TEXT),
    "TransformerEncoder, batch in dim 1": Case(
        make=lambda: Encoder(batch_first=False), layer="last", take=tokens_of_dim_1(M), cond=TEXT
    ),
    "a mixture of experts": Case(make=Mixture, layer="last", take=tokens(M), cond=TEXT),
    # two streams
    **{f"dual, {n}": Case(make=lambda n=n: Dual(n), layer="blocks.1", take=image_of(n), cond=TEXT) for n in OUT},
    **{
        f"dual, equal lengths, {n}": Case(make=lambda n=n: Dual(n), layer="blocks.1", take=image_of(n), cond=EQUAL)
        for n in OUT
    },
    "dual, softmax": Case(
        make=lambda: Dual(kernel=by_softmax), layer="blocks.1", take=image_of("image, text"), cond=TEXT
    ),
    "dual, einsum": Case(
        make=lambda: Dual(kernel=by_einsum), layer="blocks.1", take=image_of("image, text"), cond=TEXT
    ),
    "dual, softmax in float32": Case(
        make=lambda: Dual(kernel=by_upcast_softmax), layer="blocks.1", take=image_of("image, text"), cond=TEXT
    ),
    "a text sees the image": Case(make=TextSees, layer="layer", take=lambda out: [list(out[0])], cond=TEXT),
    "a text of equal length sees the image": Case(
        make=TextSees, layer="layer", take=lambda out: [list(out[0])], cond=EQUAL
    ),
    "a text sees the image, softmax": Case(
        make=lambda: TextSees(by_softmax), layer="layer", take=lambda out: [list(out[0])], cond=TEXT
    ),
    "the image sees a text of equal length": Case(
        make=Cross, layer="blocks.1", take=tokens(0, N), cond={"text": normal(B, N + 2, C), "reference": normal(B, 2, C)}
    ),
    "the image sees a text of equal length, einsum": Case(
        make=lambda: Cross(by_einsum), layer="blocks.1", take=tokens(0, N),
        cond={"text": normal(B, N + 2, C), "reference": normal(B, 2, C)},
    ),
    "a text that hears the image within rounding": Case(make=Whisper, layer="last", take=tokens(M), cond=TEXT),
    "a product of matrices behind cross-attention": Case(
        make=Product, layer="layer", take=tokens(0, N), cond=TEXT | {"reference": normal(B, 2, C)}
    ),
    "two noisy streams, a tuple": Case(
        make=TwoNoisy, layer="blocks.1", x={"image": TOKENS, "sound": normal(B, 4, 3)}, cond=TEXT,
        take=lambda out: [list(out[0]), list(out[1])],
    ),
    "two noisy streams, one sequence": Case(
        make=TwoNoisy, layer="layer", x={"image": TOKENS, "sound": normal(B, 4, 3)}, cond=TEXT,
        take=lambda out: [[torch.cat([row[:4], row[4 + M :]]) for row in out]],
    ),
    "two noisy streams of one length, a part of one clean": Case(
        make=Halves,
        layer="blocks.1",
        x={"image": TOKENS, "sound": normal(B, 4, 3)},
        cond=TEXT,
        take=lambda out: [list(out[0][:, 2:]), list(out[1])],
    ),
    # where the batch is folded
    "frames (b f)": video(),
    "frames (f b)": video(frames_first=True),
    "frames (b f), as many as samples": video(size=B),
    "frames (f b), as many as samples": video(size=B, frames_first=True),
    "one frame (b f)": replace(video(size=1), take=whole, channel=0),
    "frames (b f) behind a clean one": Case(
        make=Held, layer="layer", x=normal(B, 4, 3, 2, 5), cond={"frame": FRAME},
        take=lambda out: [[f[1:].movedim(1, -1).reshape(-1, C) for f in out.unflatten(0, (B, -1))]],
    ),
    "windows (b w), n, C": Case(make=lambda: Tokens(*WINDOWS), layer="layer", take=frames),
    "columns (b n), f, C": Case(make=lambda: Tokens(*COLUMNS), layer="layer", take=frames),
    "packed rows": packed("noisy", rows(N, N, N), cond={}),
    "packed rows, text in front": packed("text noisy", rows(N, N, N, start=B * M)),
    "packed rows, text behind": packed("noisy text", rows(N, N, N)),
    "packed rows, each behind its text": packed(
        "each", lambda out: [[row[M:] for row in out.split([M + N] * B)]]
    ),
    "packed rows of different lengths": packed("noisy", rows(5, 4, 3), (5, 4, 3), cond={}),
    "packed rows, the first of the mean length": packed("noisy", rows(*UNEVEN), UNEVEN, cond={}),
    "packed rows, the first of the mean length, text in front": packed(
        "text noisy", rows(*UNEVEN, start=B * M), UNEVEN
    ),
    "packed rows, the first of the mean length, text behind": packed("noisy text", rows(*UNEVEN), UNEVEN),
    "packed rows of different lengths, each behind its text": packed(
        "each", lambda out: [[row[M:] for row in out.split([M + n for n in UNEVEN])]], UNEVEN
    ),
    # maps
    "maps": Case(make=Maps, layer="middle", x=normal(B, 3, 6, 5), take=whole, channel=0),
    "maps as high as there are samples": Case(
        make=Maps, layer="middle", x=normal(B, 3, B, B), take=whole, channel=0
    ),
    "maps as wide as there are channels": Case(
        make=Maps, layer="middle", x=normal(B, 3, C, C), take=whole, channel=0
    ),
    "maps, channels last": Case(
        make=lambda: Maps(channels_last=True), layer="middle", x=normal(B, 3, 6, 5), channel=0,
        take=lambda out: [list(out.movedim(-1, 1))],
    ),
    "maps as high as there are channels, channels last": Case(
        make=lambda: Maps(channels_last=True), layer="middle", x=normal(B, 3, C, 5), channel=0,
        take=lambda out: [list(out.movedim(-1, 1))],
    ),
    "maps, channels last and more of them": Case(
        make=lambda: Maps(channels_last=True, wider=2), layer="middle", x=normal(B, 3, 6, 5), channel=0,
        take=lambda out: [list(out.movedim(-1, 1))],
    ),
    "volumes": Case(make=lambda: Maps(3), layer="middle", x=normal(B, 3, 4, 5, 6), take=whole, channel=0),
    "volumes, channels last": Case(
        make=lambda: Maps(3, channels_last=True), layer="middle", x=normal(B, 3, 4, 5, 6), channel=0,
        take=lambda out: [list(out.movedim(-1, 1))],
    ),
    "a map beside a clean one": Case(
        make=Beside, layer="layer", x=normal(B, 3, 4, 5), cond={"reference": normal(B, 3, 4, 5, seed=1)}, channel=0,
        take=lambda out: [list(out[..., :5])],
    ),
    "maps (B, C, L)": Case(make=lambda: Maps(1), layer="middle", x=normal(B, 3, 7), take=lambda out: [list(out.mT)]),
    "maps (B, C, L), L = C": Case(
        make=lambda: Maps(1), layer="middle", x=normal(B, 3, C), take=lambda out: [list(out.mT)]
    ),
    "maps (B, L, C)": Case(make=lambda: Maps(1, channels_last=True), layer="middle", x=normal(B, 3, 7), take=whole),
    "maps (B, L, C), L = C": Case(
        make=lambda: Maps(1, channels_last=True), layer="middle", x=normal(B, 3, C), take=whole
    ),
    "maps (B, C, 1)": Case(make=lambda: Maps(1), layer="middle", x=normal(B, 3, 1), take=lambda out: [list(out.mT)]),
    "maps (B, C, L) behind a token of the text": Case(
        make=Sound, layer="layer", x=normal(B, 3, 7), cond=TEXT, take=lambda out: [list(out[..., 1:].mT)]
    ),
    "maps as wide as there are channels, shifted by the time": Case(
        make=Shifted, layer="layer", x=normal(B, 3, 5, C), take=whole, channel=0
    ),
    "maps (B, C, L), shifted by the time": Case(
        make=lambda: Shifted(1), layer="layer", x=normal(B, 3, 7), take=lambda out: [list(out.mT)]
    ),
    # vectors
    "vectors": Case(make=Vectors, layer="net.2", x=normal(B, 3), take=whole),
    "vectors, as many channels as samples": Case(make=lambda: Vectors(B), layer="net.2", x=normal(B, 3), take=whole),
    "one number for each sample": Case(make=Vectors, layer="scalar", x=normal(B, 3), take=whole),
    # where the layer is
    "a block that runs three times": Case(make=Shared, layer="block", take=tokens(M), cond=TEXT),
    "lists in a list": Case(make=Stages, layer="stages.1.1", take=tokens(M), cond=TEXT),
    "lists in a dict by numbers": Case(make=lambda: Stages(True), layer="stages.8.1", take=tokens(M), cond=TEXT),
    "in a dict by numbers": Case(make=Pyramid, layer="levels.8", x=normal(B, 3, 6, 5), take=whole, channel=0),
    "in a dict by numbers, mixed in place, the first block twice": Case(
        make=Rounds, layer="blocks.8", take=tokens(M), cond=TEXT
    ),
    "mixed by a linear layer": Case(
        make=lambda: Mixer(False, "text noisy"), layer="layers.2", take=tokens(M), cond=TEXT
    ),
    "mixed by a recurrence": Case(
        make=lambda: Mixer(True, "noisy text"), layer="layers.2", take=tokens(0, N), cond=TEXT
    ),
}  # fmt: skip


def built(name):
    torch.manual_seed(0)
    return CASES[name].make().eval()
