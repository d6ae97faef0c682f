"""Tiny EDM denoisers with the conventions of the released ones: names of parts, arguments, attributes, preconditionings.

- `EDMPrecond`, `VPPrecond`, `VEPrecond`, `IDDPMPrecond` around a `SongUNet` (Karras et al. 2022, table 1)
- `EDM2Precond` around a `MagnitudeUNet` (Karras et al. 2024)
- `Denoiser` and `EpsDenoiser` around an `InnerModel` (k-diffusion)

Where the released ones use float16 on a GPU only, these use it everywhere, so that it is tested everywhere.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def over(x):
    return x.reshape(-1, 1, 1, 1)


# --- EDM --------------------------------------------------------------------------------------------------------------


def cast(module, x):
    """The module's weights in the dtype of x."""
    return {name: weight.to(x.dtype) for name, weight in module.named_parameters(recurse=False)}


class Conv(nn.Conv2d):
    def __init__(self, channels, out, kernel, up=False, down=False):
        super().__init__(channels, out, kernel, padding=kernel // 2)
        self.up, self.down = up, down

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2.0) if self.up else F.avg_pool2d(x, 2) if self.down else x
        return F.conv2d(x, padding=self.padding, **cast(self, x))


class Norm(nn.GroupNorm):
    def forward(self, x):
        return F.group_norm(x, self.num_groups, **cast(self, x))


class Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, **cast(self, x))


class UNetBlock(nn.Module):
    def __init__(self, channels, out, width, attention=False, **resample):
        super().__init__()
        self.in_channels, self.out_channels, self.attention = channels, out, attention
        self.norm0, self.conv0 = Norm(4, channels), Conv(channels, out, 3, **resample)
        self.affine = Linear(width, out)
        self.norm1, self.conv1 = Norm(4, out), Conv(out, out, 3)
        self.dropout = nn.Dropout(0.1)
        self.skip = Conv(channels, out, 1, **resample) if resample or out != channels else None
        if attention:
            self.norm2, self.qkv, self.proj = Norm(4, out), Conv(out, 3 * out, 1), Conv(out, out, 1)

    def forward(self, x, emb):
        hidden = self.conv0(F.silu(self.norm0(x)))
        hidden = F.silu(self.norm1(hidden.add_(over2(self.affine(emb)).to(x.dtype))))
        x = self.conv1(self.dropout(hidden)).add_(x if self.skip is None else self.skip(x)) * math.sqrt(0.5)
        if self.attention:
            q, k, v = self.qkv(self.norm2(x)).flatten(2).chunk(3, 1)
            weights = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(q.shape[1])).softmax(2)
            x = self.proj(torch.einsum("nqk,nck->ncq", weights, v).reshape(x.shape)).add_(x) * math.sqrt(0.5)
        return x


def over2(x):
    return x[:, :, None, None]


class SongUNet(nn.Module):
    """Two resolutions; `enc` and `dec` are dicts by resolution, the middle is the last block called `in`."""

    def __init__(self, resolution, channels, out, label_dim=0, augment_dim=0, width=16):
        super().__init__()
        low, emb = f"{resolution // 2}x{resolution // 2}", 4 * width
        high = f"{resolution}x{resolution}"
        self.register_buffer("freqs", torch.randn(width // 2))
        self.map_label = Linear(label_dim, width) if label_dim else None
        self.map_augment = Linear(augment_dim, width, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = Linear(width, emb), Linear(emb, emb)
        self.enc = nn.ModuleDict({
            f"{high}_conv": Conv(channels, width, 3),
            f"{high}_block0": UNetBlock(width, width, emb),
            f"{low}_down": UNetBlock(width, width, emb, down=True),
            f"{low}_block0": UNetBlock(width, 2 * width, emb, attention=True),
        })  # fmt: skip
        self.dec = nn.ModuleDict({
            f"{low}_in0": UNetBlock(2 * width, 2 * width, emb, attention=True),
            f"{low}_in1": UNetBlock(2 * width, 2 * width, emb),
            f"{low}_block0": UNetBlock(4 * width, 2 * width, emb),
            f"{low}_block1": UNetBlock(3 * width, 2 * width, emb),
            f"{high}_up": UNetBlock(2 * width, 2 * width, emb, up=True),
            f"{high}_block0": UNetBlock(3 * width, width, emb),
            f"{high}_block1": UNetBlock(2 * width, width, emb),
            f"{high}_aux_norm": Norm(4, width),
            f"{high}_aux_conv": Conv(width, out, 3),
        })  # fmt: skip

    def forward(self, x, noise_labels, class_labels, augment_labels=None):
        angles = noise_labels[:, None] * self.freqs
        emb = torch.cat([angles.cos(), angles.sin()], 1)
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        skips = []
        for name, block in self.enc.items():
            x = block(x) if "conv" in name else block(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            if "aux" in name:
                x = block(x) if "norm" in name else block(F.silu(x))
                continue
            x = x if x.shape[1] == block.in_channels else torch.cat([x, skips.pop()], 1)
            x = block(x, emb)
        return x


class Precond(nn.Module):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise)."""

    sigma_min, sigma_max, variance = 0.0, float("inf"), False

    def __init__(self, resolution=8, channels=3, label_dim=0, use_fp16=False, **unet):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim, self.use_fp16 = (
            resolution,
            channels,
            label_dim,
            use_fp16,
        )
        self.model = SongUNet(resolution, channels, channels * (1 + self.variance), label_dim, **unet)

    def forward(self, x, sigma, class_labels=None, force_fp32=False, **model_kwargs):
        x, sigma = x.to(torch.float32), over(sigma.to(torch.float32))
        if self.label_dim:
            class_labels = torch.zeros(1, self.label_dim) if class_labels is None else class_labels.to(torch.float32)
        dtype = torch.float16 if self.use_fp16 and not force_fp32 else torch.float32
        skip, out, scale, noise = self.coefficients(sigma)
        given = self.model((scale * x).to(dtype), noise.flatten(), class_labels, **model_kwargs)
        assert given.dtype == dtype
        return skip * x + out * given[:, : self.img_channels].to(torch.float32)

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)


class EDMPrecond(Precond):
    sigma_data = 0.5

    def coefficients(self, sigma):
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


class VPPrecond(Precond):
    beta_d, beta_min = 19.9, 0.1
    sigma_min, sigma_max = 0.0016, 152.0

    def coefficients(self, sigma):
        root = (self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt()
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), 999 * (root - self.beta_min) / self.beta_d


class VEPrecond(Precond):
    sigma_min, sigma_max = 0.02, 100.0

    def coefficients(self, sigma):
        return 1, sigma, 1, (0.5 * sigma).log()


class IDDPMPrecond(Precond):
    """The network knows `levels` noise levels, and predicts a variance as well."""

    variance = True

    def __init__(self, levels=50, **config):
        super().__init__(**config)
        bar = (0.5 * math.pi * torch.arange(levels + 1) / levels / 1.008).sin() ** 2
        u = torch.zeros(levels + 1)
        for j in range(levels, 0, -1):
            u[j - 1] = ((u[j] ** 2 + 1) / (bar[j - 1] / bar[j]).clip(min=0.001) - 1).sqrt()
        self.register_buffer("u", u)
        self.sigma_min, self.sigma_max = float(u[-2]), float(u[0])

    def coefficients(self, sigma):
        index = self.round_sigma(sigma, return_index=True)
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), len(self.u) - 2 - index.to(torch.float32)

    def round_sigma(self, sigma, return_index=False):
        index = (torch.as_tensor(sigma).flatten()[:, None] - self.u).abs().argmin(1)
        return (index if return_index else self.u[index]).reshape(sigma.shape)


# --- EDM2 -------------------------------------------------------------------------------------------------------------


def normalise(x, dims):
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / (1e-4 + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x):
    return F.silu(x) / 0.596


def mp_sum(a, b, t=0.3):
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


class MPConv(nn.Module):
    """Weights of unit norm; in train mode they are written back normalised in each forward."""

    def __init__(self, channels, out, *kernel):
        super().__init__()
        self.out_channels = out
        self.weight = nn.Parameter(torch.randn(out, channels, *kernel))

    def forward(self, x, gain=1):
        weight, dims = self.weight.to(torch.float32), list(range(1, self.weight.ndim))
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalise(weight, dims))
        weight = (normalise(weight, dims) * (gain / math.sqrt(weight[0].numel()))).to(x.dtype)
        return x @ weight.t() if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class Block(nn.Module):
    def __init__(self, channels, out, width, flavor="enc", resample="", attention=False):
        super().__init__()
        self.out_channels, self.flavor, self.resample = out, flavor, resample
        self.emb_gain = nn.Parameter(torch.tensor(0.5))
        self.conv_res0 = MPConv(out if flavor == "enc" else channels, out, 3, 3)
        self.emb_linear = MPConv(width, out)
        self.conv_res1 = MPConv(out, out, 3, 3)
        self.conv_skip = MPConv(channels, out, 1, 1) if channels != out else None
        self.attn_qkv = MPConv(out, 3 * out, 1, 1) if attention else None
        self.attn_proj = MPConv(out, out, 1, 1) if attention else None

    def forward(self, x, emb):
        x = {"": lambda x: x, "up": lambda x: F.interpolate(x, scale_factor=2.0), "down": lambda x: F.avg_pool2d(x, 2)}[
            self.resample
        ](x)
        if self.flavor == "enc":
            x = normalise(x if self.conv_skip is None else self.conv_skip(x), 1)
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        hidden = self.conv_res1(mp_silu(self.conv_res0(mp_silu(x)) * over2(scale).to(x.dtype)))
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, hidden)
        if self.attn_qkv is not None:
            q, k, v = (normalise(part, 1) for part in self.attn_qkv(x).flatten(2).chunk(3, 1))
            weights = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(q.shape[1])).softmax(2)
            x = mp_sum(x, self.attn_proj(torch.einsum("nqk,nck->ncq", weights, v).reshape(x.shape)))
        return x.clip_(-256, 256)


class MagnitudeUNet(nn.Module):
    def __init__(self, resolution, channels, label_dim, width=16):
        super().__init__()
        low, high, emb = f"{resolution // 2}x{resolution // 2}", f"{resolution}x{resolution}", 2 * width
        self.out_gain = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))
        self.emb_noise = MPConv(width, emb)
        self.emb_label = MPConv(label_dim, emb) if label_dim else None
        self.enc = nn.ModuleDict({
            f"{high}_conv": MPConv(channels + 1, width, 3, 3),
            f"{high}_block0": Block(width, width, emb),
            f"{low}_down": Block(width, width, emb, resample="down"),
            f"{low}_block0": Block(width, 2 * width, emb, attention=True),
        })  # fmt: skip
        self.dec = nn.ModuleDict({
            f"{low}_in0": Block(2 * width, 2 * width, emb, "dec", attention=True),
            f"{low}_in1": Block(2 * width, 2 * width, emb, "dec"),
            f"{low}_block0": Block(4 * width, 2 * width, emb, "dec"),
            f"{low}_block1": Block(3 * width, 2 * width, emb, "dec"),
            f"{high}_up": Block(2 * width, 2 * width, emb, "dec", "up"),
            f"{high}_block0": Block(3 * width, width, emb, "dec"),
            f"{high}_block1": Block(2 * width, width, emb, "dec"),
        })  # fmt: skip
        self.out_conv = MPConv(width, channels, 3, 3)

    def forward(self, x, noise_labels, class_labels):
        emb = self.emb_noise((noise_labels[:, None] * self.freqs + self.phases).cos() * math.sqrt(2))
        if self.emb_label is not None:
            emb = mp_sum(emb, self.emb_label(class_labels * math.sqrt(class_labels.shape[1])), t=0.5)
        emb = mp_silu(emb)
        x, skips = torch.cat([x, torch.ones_like(x[:, :1])], 1), []
        for name, block in self.enc.items():
            x = block(x) if "conv" in name else block(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(torch.cat([x, skips.pop()], 1) if "block" in name else x, emb)
        return self.out_conv(x, gain=self.out_gain)


class EDM2Precond(nn.Module):
    def __init__(self, resolution=8, channels=3, label_dim=0, use_fp16=False, sigma_data=0.5):
        super().__init__()
        self.label_dim, self.use_fp16, self.sigma_data = label_dim, use_fp16, sigma_data
        self.unet = MagnitudeUNet(resolution, channels, label_dim)
        self.logvar_linear = MPConv(1, 1)

    def forward(self, x, sigma, class_labels=None, force_fp32=False, return_logvar=False, **unet_kwargs):
        x, sigma = x.to(torch.float32), over(sigma.to(torch.float32))
        if self.label_dim:
            class_labels = torch.zeros(1, self.label_dim) if class_labels is None else class_labels.to(torch.float32)
        dtype = torch.float16 if self.use_fp16 and not force_fp32 else torch.float32
        total, noise = sigma**2 + self.sigma_data**2, sigma.flatten().log() / 4
        given = self.unet((x / total.sqrt()).to(dtype), noise, class_labels, **unet_kwargs)
        denoised = self.sigma_data**2 / total * x + sigma * self.sigma_data / total.sqrt() * given.to(torch.float32)
        return (denoised, over(self.logvar_linear(noise[:, None]))) if return_logvar else denoised


# --- k-diffusion ------------------------------------------------------------------------------------------------------


class Level(nn.Module):
    """A convolution, told the noise level and the class."""

    def __init__(self, channels, out, width=16):
        super().__init__()
        self.conv, self.mapping = nn.Conv2d(channels, out, 3, padding=1), nn.Linear(width, out)

    def forward(self, x, cond):
        return torch.tanh(self.conv(x) + over2(self.mapping(cond)))


class Levels(nn.Module):
    def __init__(self):
        super().__init__()
        self.d_blocks = nn.ModuleList([Level(8, 8), Level(8, 16), Level(16, 16)])
        self.u_blocks = nn.ModuleList([Level(16, 16), Level(32, 8), Level(16, 8)])

    def forward(self, x, cond):
        skips = []
        for block in self.d_blocks:
            x = block(x, cond)
            skips.append(x)
        for i, block in enumerate(self.u_blocks):
            x = block(x if i == 0 else torch.cat([x, skips[-1 - i]], 1), cond)
        return x


class InnerModel(nn.Module):
    """The network inside k-diffusion's wrappers: it holds a `sigma_data` and takes a sigma, but gives no clean sample."""

    def __init__(self, channels=3, sigma_data=1.0, classes=10):
        super().__init__()
        self.sigma_data = sigma_data
        self.mapping, self.class_emb = nn.Linear(1, 16), nn.Embedding(classes, 16)
        self.proj_in, self.proj_out = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)
        self.u_net = Levels()

    def forward(self, input, sigma, class_cond):
        cond = torch.tanh(self.mapping(sigma.log()[:, None] / 4) + self.class_emb(class_cond))
        return self.proj_out(self.u_net(self.proj_in(input), cond))


class Denoiser(nn.Module):
    def __init__(self, inner_model, sigma_data=1.0):
        super().__init__()
        self.inner_model, self.sigma_data = inner_model, sigma_data

    def get_scalings(self, sigma):
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total**0.5, 1 / total**0.5

    def forward(self, input, sigma, **kwargs):
        skip, out, scale = map(over, self.get_scalings(sigma))
        return self.inner_model(input * scale, sigma, **kwargs) * out + input * skip


class EpsDenoiser(nn.Module):
    """A model of ε on a table of ᾱ, as D(x, sigma)."""

    def __init__(self, inner_model, alpha_bar):
        super().__init__()
        self.inner_model = inner_model
        self.register_buffer("log_sigmas", ((1 - alpha_bar) / alpha_bar).sqrt().log().float())

    def sigma_to_t(self, sigma):
        return (sigma.log()[:, None] - self.log_sigmas).abs().argmin(1)

    def forward(self, input, sigma, **kwargs):
        scale = over(1 / (sigma**2 + 1) ** 0.5)
        return input - over(sigma) * self.inner_model(input * scale, self.sigma_to_t(sigma) + 1.0, **kwargs)
