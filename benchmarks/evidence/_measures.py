"""What samples are measured by, each in the features of a named network, at a number of samples that is given beside it.

A Fréchet distance in other features than Inception's is not FID: `FD-FashionCNN`, `FD-EffLite0`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from perceptual_diffusion.cli import metrics

Seen = tuple[Tensor, Tensor | None]
"""Features (N, D), and class logits (N, K) of a network that is a classifier of the data."""


@cache
def network(name: str, device: str) -> Callable[[Tensor], Seen]:
    """Load a network: uint8 pictures (N, C, 32, 32) to what it sees in them, on the CPU."""
    import _classifier

    net = (_classifier.read() if name == "FashionCNN" else metrics.Network()).to(device)

    @torch.no_grad()
    def see(images: Tensor) -> Seen:
        found = [net(part.to(device)) for part in images.split(500)]
        if name == "FashionCNN":
            return torch.cat([f for f, _ in found]).cpu(), torch.cat([c for _, c in found]).cpu()
        return torch.cat(found).cpu(), None

    return see


def frechet(one: Tensor, other: Tensor) -> float:
    """The Fréchet distance of two sets of features, in float64."""
    given = metrics._Given()
    given.num_features = one.shape[1]
    metric: Any = FrechetInceptionDistance(feature=given).set_dtype(torch.float64)
    metric.update(one.double(), real=True)
    metric.update(other.double(), real=False)
    return float(metric.compute())


def compare(name: str, real: Seen, made: Seen, labels: Tensor | None, *, neighbours: bool = True) -> dict[str, float]:
    """Compare what a network sees in samples with what it sees in real pictures.

    Args:
        name: the network.
        real: of real pictures.
        made: of samples.
        labels: the classes asked for, shape (N,), if any were.
        neighbours: whether there are precision and recall: where nearly all nearest neighbours are near copies they say nothing.

    Returns:
        `FD`, `KID` (times 1000), `precision` and `recall` (k = 3), all with the network's name; of a classifier also `CS`, the
        classifier score exp E KL(p(y|x) || p(y)), as the inception score is, and `class`, the share of samples taken for what was asked.
    """
    size = min(1000, len(real[0]) // 2, len(made[0]) // 2)
    kid = kid_features_to_metric(made[0], real[0], kid_subsets=50, kid_subset_size=size, rng_seed=0, verbose=False)
    found = {"FD": frechet(real[0], made[0]), "KID": 1000 * kid["kernel_inception_distance_mean"]}
    if neighbours:
        prc = prc_features_to_metric(made[0], real[0], verbose=False, save_cpu_ram=True, prc_batch_size=2000)
        found |= {"precision": prc["precision"], "recall": prc["recall"]}
    if made[1] is not None:
        found["CS"] = isc_features_to_metric(made[1])["inception_score_mean"]
        if labels is not None:
            found["class"] = float((made[1].argmax(1) == labels).float().mean())
    return {f"{key}-{name}": float(value) for key, value in found.items()}


def nearest(train: Tensor, images: Tensor, device: str) -> float:
    """The mean distance of pictures to the nearest training picture."""
    return float(metrics.nearest(train.to(device), images.to(device)).mean())
