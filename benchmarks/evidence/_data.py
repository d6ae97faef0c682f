"""Fashion-MNIST and emoji as the benchmark sees them."""

from dataclasses import dataclass, replace
from functools import cache

import torch

from perceptual_diffusion.cli import datasets


@dataclass(frozen=True, kw_only=True)
class Data:
    """A training set, and the pictures that samples are compared with.

    Attributes:
        train: what is trained on, uint8, shape (N, C, 32, 32).
        real: what the samples are compared with: the test set of Fashion-MNIST; the training set of emoji, whose test set
            of 190 is too small for a Fréchet distance.
        network: the name of the metric network.
    """

    train: datasets.Pictures
    real: datasets.Pictures
    network: str

    @property
    def channels(self) -> int:
        """Channels of a picture."""
        return self.train.images.shape[1]


SEARCH = ", against training pictures"
"""At the end of a name: samples are compared with 10,000 training pictures, so that a recipe can be chosen without the test set."""


@cache
def load(name: str) -> Data:
    """Load "fashion-mnist" (grey, 28 pixels on a border of 2), "emoji" (colour), or what else `datasets.load` knows."""
    if name.endswith(SEARCH):
        data = load(name.removesuffix(SEARCH))
        some = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:10_000]
        return replace(data, real=data.train.select(some))
    split = datasets.load(name)
    if name == "fashion-mnist":
        train, real = (replace(p, images=p.images[:, :1].clone()) for p in (split.train, split.held_out))
        return Data(train=train, real=real, network="FashionCNN")
    return Data(train=split.train, real=split.train if name == "emoji" else split.held_out, network="EffLite0")
