"""The models under study: small denoisers, trained by plain MSE from scratch.

A base says what `run.py` has to know of a kind of data; this one is of pictures, those of sounds and of clips are in `_audio.py`
and `_video.py`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from _data import SEARCH, load
from _measures import Seen, compare, nearest, network
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor, nn
from torchvision.utils import save_image

from perceptual_diffusion.cli import datasets
from perceptual_diffusion.cli.demo import load_base
from perceptual_diffusion.cli.files import load_state
from perceptual_diffusion.cli.training import FineTuning

FOLDER = Path(__file__).parent / "bases"


@dataclass(frozen=True, kw_only=True)
class Base:
    """A model of pictures, and how it is trained and measured.

    Attributes:
        name: what it is called in the results.
        dataset: what it is trained on.
        make: builds it from the number of channels and of classes.
        scheduler: makes its scheduler, which gives the schedule and the prediction, and samples.
        drop: for what share of the samples the class is left out; 1 makes it unconditional.
        steps: training steps.
        rounds: how many times the learning rate goes from its height to its end in them.
        batch: samples in one of them.
        lr: learning rate.
        decay: decay of the averaged weights.
        n: how many samples are measured.
        at_once: how many of them are drawn at once on a CPU; on a GPU twenty times as many.
        tuning: the class of its trainings.
    """

    name: str
    dataset: str
    make: Callable[[int, int], nn.Module]
    scheduler: Callable[[], Any]
    drop: float = 0.1
    steps: int = 20000
    rounds: int = 1
    batch: int = 64
    lr: float = 1e-3
    decay: float = 0.9995
    n: int = 10_000
    at_once: int = 100
    tuning: type[FineTuning] = FineTuning

    @property
    def conditional(self) -> bool:
        """Whether it is told the class."""
        return self.drop < 1

    @property
    def train(self) -> datasets.Pictures:
        """What it is trained on."""
        return load(self.dataset).train

    @property
    def null(self) -> int:
        """The class that means none."""
        return len(self.train.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample as the model sees it."""
        return tuple(datasets.to_model(self.train.images[:1]).shape[1:])

    def build(self, seed: int = 0) -> nn.Module:
        """Make the model with random weights."""
        torch.manual_seed(seed)
        return self.make(self.shape[0], self.null)

    def read(self) -> nn.Module:
        """Make the model with the trained weights that the repository holds."""
        model = self.build()
        model.load_state_dict({k: v.float() for k, v in load_state(FOLDER / f"{self.name}.safetensors")[0].items()})
        return model

    @property
    def trained(self) -> int:
        """How many steps the weights that the repository holds have been trained for; 0 if it holds none."""
        path = FOLDER / f"{self.name}.safetensors"
        return int(load_state(path)[1]["step"]) if path.exists() else 0

    def factor(self, step: int, start: int = 0) -> float:
        """What the learning rate is multiplied by: it rises over the first 500 steps, and falls to a tenth over the last 40 % of each round.

        Args:
            step: the step, counted from `start`.
            start: the step that a restart went on from.
        """
        rise, step = (step + 1) / 500, start + step
        length = self.steps // self.rounds
        place = step / length - min(step // length, self.rounds - 1)
        return min(1.0, rise, max(0.1, 1 - 0.9 * (place - 0.6) / 0.4))

    def classes(self, n: int) -> Tensor:
        """The classes to sample: in turn."""
        return torch.arange(n) % self.null

    def finish(self, sample: Tensor) -> Tensor:
        """Turn samples into what is measured: uint8 pictures."""
        return datasets.to_images(sample)

    def measure(self, made: Tensor, labels: Tensor | None, device: str) -> dict[str, float]:
        """Measure what `finish` gave.

        Returns:
            `compare`'s metrics, and `nearest`: the mean distance to the nearest training picture, root mean square over pixels, of the
            pixel range.
        """
        data = load(self.dataset)
        found = compare(data.network, real(self.dataset, device), network(data.network, device)(made), labels)
        return found | {"nearest": nearest(data.train.images, made[:2000], device)}

    def references(self, device: str, seed: int) -> dict[str, tuple[int, dict[str, float]]]:
        """What real pictures get: a name, how many, and the metrics.

        As many training pictures as samples are measured, as if they were samples: the best to be had. `nearest` is that of test pictures.
        """
        data = load(self.dataset)
        some = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[: self.n]
        seen = network(data.network, device)(data.train.images[some])
        found = compare(data.network, real(self.dataset, device), seen, data.train.labels[some])
        found["nearest"] = nearest(data.train.images, data.real.images[:2000], device)
        return {"training pictures": (len(some), found)}

    def show(self, made: Tensor, labels: Tensor, path: Path) -> None:
        """Write some of what `finish` gave: ten of each class."""
        save_image(made[: 10 * self.null].float() / 255, path.with_name(f"{path.name}.png"), nrow=self.null)


class Packaged(Base):
    """The base of the package, as it was trained on a GPU; its record is beside its weights."""

    def build(self, seed: int = 0) -> nn.Module:
        return self.read()

    def read(self) -> nn.Module:
        model: nn.Module = load_base(self.null)[0]
        return model

    def classes(self, n: int) -> Tensor:
        """Those of the pictures that samples are compared with, as often as they come."""
        return self.train.labels[torch.arange(n) % len(self.train)]

    @property
    def trained(self) -> int:
        record = resources.files("perceptual_diffusion") / "assets/base/training.json"
        return int(json.loads(record.read_text("utf-8"))["steps"])


@cache
def real(dataset: str, device: str) -> Seen:
    """What the metric network sees in the real pictures."""
    data = load(dataset)
    return network(data.network, device)(data.real.images)


def unet(channels: int, classes: int) -> nn.Module:
    """A UNet of 1.2 M parameters on 16 x 16."""
    return UNet2DModel(
        sample_size=16, in_channels=channels, out_channels=channels, block_out_channels=(32, 64, 64),
        layers_per_block=1, norm_num_groups=16, attention_head_dim=32, dropout=0.0,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"), num_class_embeds=classes + 1,
    )  # fmt: skip


def dit(channels: int, classes: int) -> nn.Module:
    """A DiT of 1.2 M parameters on 16 x 16 in patches of 2. Classes are left out by us, as for the UNet, not by the model."""
    model = DiTTransformer2DModel(
        sample_size=16, in_channels=channels, out_channels=channels, num_layers=6, num_attention_heads=4,
        attention_head_dim=24, patch_size=2, num_embeds_ada_norm=classes,
    )  # fmt: skip
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model


def ddim() -> Any:
    """The schedule of the paper: Stable Diffusion's at zero terminal SNR, v-prediction, DDIM with trailing timesteps."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip


def flow() -> Any:
    """Flow matching along straight lines, with Euler's steps."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


BASES = {
    base.name: base
    for base in (
        Base(name="fashion-unet", dataset="fashion-mnist", make=unet, scheduler=ddim),
        Base(
            name="fashion-unet-unconditional",
            dataset="fashion-mnist",
            make=unet,
            scheduler=ddim,
            drop=1.0,
            steps=40_000,
            rounds=2,
        ),
        Base(name="fashion-dit-flow", dataset="fashion-mnist", make=dit, scheduler=flow),
        Packaged(
            name="emoji-unet",
            dataset="emoji",
            make=unet,
            scheduler=lambda: load_base(9)[1],
            steps=24585,
            batch=32,
            n=1702,
        ),
    )
}
"""The bases of pictures."""
BASES["fashion-unet, search"] = replace(BASES["fashion-unet"], dataset=f"fashion-mnist{SEARCH}", n=2000)
