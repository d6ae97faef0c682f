"""Metrics of samples in the features of a named network: EfficientNet-Lite0, trained on ImageNet.

A Fréchet distance in its features is `FD-EffLite0`, not FID, and depends on the number of samples: compare at equal N.
Only a distance in the features of torch-fidelity's Inception is called FID.
"""

from collections.abc import Iterator
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

NETWORK = "EffLite0"
RESOLUTION = 64
FEATURES = 1280
NEIGHBOURS = 3
"""The neighbour that a ball of the precision reaches to."""


class Network(nn.Module):
    """EfficientNet-Lite0 up to its pooled features: uint8 pictures (B, 3, H, W) to (B, 1280).

    Args:
        resolution: the extent that pictures are resized to.
    """

    def __init__(self, resolution: int = RESOLUTION) -> None:
        super().__init__()
        import timm

        self.resolution = resolution
        self.model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
        weights = _weights("model")
        left = self.model.load_state_dict(weights, strict=False)
        if left.unexpected_keys or any(not key.endswith("num_batches_tracked") for key in left.missing_keys):
            raise RuntimeError(f"the metric network does not fit this version of timm: {left}. Install timm 1.0.")
        config = self.model.default_cfg
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(config["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(config["std"])[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Give the pooled features of uint8 pictures, shape (B, 1280)."""
        pixels = nn.functional.interpolate(images.float() / 255, self.resolution, mode="bicubic", antialias=True)
        features: Tensor = self.model((pixels.clamp(0, 1) - self.mean) / self.std)
        return features


def classify(features: Tensor) -> Tensor:
    """Give the logits of ImageNet's classes, shape (N, 1000), from features of EfficientNet-Lite0, shape (N, 1280)."""
    head = _weights("classifier")
    return features @ head["weight"].T + head["bias"]


def _weights(name: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with resources.as_file(resources.files("perceptual_diffusion") / f"assets/efflite0/{name}.safetensors") as path:
        return {key: value.float() for key, value in load_file(path).items()}


@torch.no_grad()
def features(network: Network, images: Tensor, batch: int = 128) -> Tensor:
    """Give the features of uint8 pictures (N, 3, H, W): float32, shape (N, 1280), on the CPU, where metrics take float64."""
    device = next(network.model.parameters()).device
    parts = [network(part.to(device)).cpu() for part in images.split(batch)]
    return torch.cat(parts) if parts else torch.empty(0, FEATURES)


class _Given(nn.Module):
    """Hands features that are already computed to torchmetrics."""

    def __init__(self, width: int = FEATURES) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, given: Tensor) -> Tensor:
        return given


def subset_size(real: int, fake: int) -> int:
    """Give the size of KID's subsets for sets of these sizes."""
    return max(2, min(500, real // 2, fake // 2))


def compare(real: Tensor, fake: Tensor, *, seed: int = 0, network: str = NETWORK) -> dict[str, float]:
    """Compare two sets of features.

    Args:
        real: features of real pictures, shape (M, D).
        fake: features of samples, shape (N, D).
        seed: seed of KID's subsets.
        network: the name of what gave the features.

    Returns:
        `FD-EffLite0` (Fréchet distance), and `KID-EffLite0` (times 1000; polynomial kernel, 50 subsets of half the samples, at most 500) with
        its standard deviation over the subsets, `KID-EffLite0 ±`; all with the name of the network.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    size, given = subset_size(len(real), len(fake)), _Given(real.shape[1])
    fd: Any = FrechetInceptionDistance(feature=given).to(real.device).set_dtype(torch.float64)
    kid: Any = KernelInceptionDistance(feature=given, subsets=50, subset_size=size).to(real.device)
    for metric in (fd, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean, std = kid.compute()
    return {
        f"FD-{network}": float(fd.compute()),
        f"KID-{network}": 1000 * float(mean),
        f"KID-{network} ±": 1000 * float(std),
    }


def precision_recall(
    real: Tensor, fake: Tensor, *, neighbours: int = NEIGHBOURS, rows: int = 1000
) -> tuple[float, float]:
    """Give precision and recall (Kynkäänniemi et al., arXiv 1904.06991).

    Precision is the share of samples that lie in the ball of some real picture, which reaches to its k-th nearest other
    real picture; recall is the same with the two sets exchanged.

    Args:
        real: features of real pictures, shape (M, D), M more than `neighbours`.
        fake: features of samples, shape (N, D), N more than `neighbours`.
        neighbours: k.
        rows: how many rows of distances are held at once.
    """
    real, fake = real.double(), fake.double()

    def distances(one: Tensor, other: Tensor) -> Iterator[Tensor]:
        return (torch.cdist(part, other) for part in one.split(rows))

    def share(points: Tensor, centres: Tensor) -> float:
        radii = torch.cat([part.kthvalue(neighbours + 1).values for part in distances(centres, centres)])
        return float(torch.cat([(part <= radii).any(1) for part in distances(points, centres)]).double().mean())

    return share(fake, real), share(real, fake)


def classifier_score(logits: Tensor) -> float:
    """Give exp E KL(p(y|x) || p(y)), the inception score's formula, over all samples at once, from logits (N, K)."""
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    return float((p * (log_p - p.mean(0).log())).sum(1).mean().exp())


def kid_difference(real: Tensor, fake: Tensor, other: Tensor) -> tuple[float, float]:
    """Give KID(fake) − KID(other), times 1000, and its standard error.

    The two sets are made from the same noise, sample by sample, so the error is that of the paired difference, by the
    jackknife over samples: much smaller than the errors of the two. Training seeds are not in it.

    Args:
        real: features of real pictures, shape (M, 1280).
        fake: features of samples, shape (N, 1280), N at least 3.
        other: features of other samples from the same noise, shape (N, 1280).
    """

    def statistic(samples: Tensor) -> tuple[Tensor, Tensor]:
        """KID up to the term of the real pictures alone: of all samples, and without each of them."""
        x, n = samples.double(), len(samples)
        within = (x @ x.T / FEATURES + 1) ** 3
        within.fill_diagonal_(0)
        cross = ((x @ real.double().T / FEATURES + 1) ** 3).mean(1)
        rows, total = within.sum(1), within.sum()
        whole = total / (n * (n - 1)) - 2 * cross.mean()
        without = (total - 2 * rows) / ((n - 1) * (n - 2)) - 2 * (cross.sum() - cross) / (n - 1)
        return whole, without

    (a, a_without), (b, b_without) = statistic(fake), statistic(other)
    left_out = a_without - b_without
    variance = (len(fake) - 1) * left_out.var(correction=0)
    return 1000 * float(a - b), 1000 * float(variance.sqrt())


def nearest(train: Tensor, images: Tensor) -> Tensor:
    """Give the root mean square distance of each picture to the nearest of a set, in units of the pixel range.

    Args:
        train: uint8, shape (M, 3, H, W).
        images: uint8, shape (N, 3, H, W).

    Returns:
        distances in [0, 1], shape (N,).
    """
    dimension = train[0].numel()
    table = train.flatten(1).float() / 255
    distances = [torch.cdist(part.flatten(1).float() / 255, table).min(1).values for part in images.split(256)]
    found: Tensor = torch.cat(distances) / dimension**0.5
    return found
