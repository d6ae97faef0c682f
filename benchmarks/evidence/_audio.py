"""The Sonic Pi samples as pictures that the benchmark trains on, and the network whose features tell sounds apart.

A crop of 0.73 s at 11,025 Hz is its short-time Fourier transform X, as X / |X|^(2/3) so that quiet parts count, real and imaginary part
in 8 bits: 2 x 128 frequencies x 64 frames. It turns back into sound without a vocoder. Folded by 2 it is stored as (8, 64, 32); the
trainer folds it again, so that a model sees (32, 32, 16), times 5.

165 clips are few: each gives as many crops, and one clip in ten is held out whole, so that no crop of it is ever trained on.
`python benchmarks/evidence/_audio.py` trains SonicCNN (minutes on one core) and writes its weights and what it reaches.
"""

import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _bases import Base, ddim
from _measures import Seen, compare, nearest
from diffusers import UNet2DModel
from torch import Tensor, nn

from perceptual_diffusion.cli import datasets
from perceptual_diffusion.cli._errors import UserError
from perceptual_diffusion.cli.datasets import Pictures, Split
from perceptual_diffusion.cli.training import FineTuning

FOLDER = Path("/usr/share/sonic-pi/samples")
WEIGHTS = Path(__file__).parent / "sonic_cnn.safetensors"
RATE, WINDOW, HOP, FRAMES = 11025, 256, 128, 64
LENGTH = HOP * (FRAMES - 1)
LOUD = WINDOW / 4
"""The transform of a sine of amplitude 1 under the window of Hann: 1 in a picture."""
SCALE = 5.0
"""What a model sees is a picture in [-1, 1] times this: the standard deviation is then 0.5, not the 0.1 that a few peaks at 1 leave."""
CROPS = 32
FEATURES = 64


def to_pictures(sound: Tensor) -> Tensor:
    """Turn sound in [-1, 1], shape (B, 8064), into pictures, uint8, shape (B, 8, 64, 32)."""
    window = torch.hann_window(WINDOW, device=sound.device)
    seen = torch.stft(sound, WINDOW, HOP, window=window, pad_mode="constant", return_complex=True)[:, :-1] / LOUD
    seen = seen / seen.abs().clamp(min=1e-9) ** (2 / 3)
    pixels = torch.view_as_real(seen).permute(0, 3, 1, 2).clamp(-1, 1)
    return nn.functional.pixel_unshuffle(((pixels + 1) * 127.5).round(), 2).to(torch.uint8)


def _parts(pictures: Tensor) -> Tensor:
    """Real and imaginary part of the compressed transform, shape (B, 2, 128, 64)."""
    return nn.functional.pixel_shuffle(pictures.float() / 127.5 - 1, 2)


def to_sound(pictures: Tensor) -> Tensor:
    """Undo `to_pictures`, up to 8 bits and the highest frequency: shape (B, 8064)."""
    parts = _parts(pictures)
    parts = parts * parts.norm(dim=1, keepdim=True).square() * LOUD
    seen = torch.view_as_complex(parts.permute(0, 2, 3, 1).contiguous())
    window = torch.hann_window(WINDOW, device=pictures.device)
    return torch.istft(nn.functional.pad(seen, (0, 0, 0, 1)), WINDOW, HOP, window=window, length=LENGTH)


def spectra(pictures: Tensor) -> Tensor:
    """What is compared, since the ear hears little of the phase: cube roots of magnitudes, uint8, shape (B, 1, 128, 64)."""
    return (_parts(pictures).norm(dim=1, keepdim=True).clamp(max=1) * 255).round().to(torch.uint8)


def read_clip(path: Path) -> Tensor:
    """Read a clip: one channel at 11,025 Hz, peak 1, cut after it has last been within 40 dB of that."""
    import soundfile
    from scipy.signal import resample_poly

    given, rate = soundfile.read(path, dtype="float64", always_2d=True)
    common = math.gcd(RATE, rate)
    sound = torch.from_numpy(resample_poly(given.mean(1), RATE // common, rate // common)).float()
    sound = sound / sound.abs().max().clamp(min=1e-4)
    audible = (sound.abs() > 0.01).nonzero()
    return sound[: int(audible[-1]) + 1] if len(audible) else sound


def crops(sound: Tensor, many: int = CROPS) -> Tensor:
    """Cut a clip, after a rest of a quarter of a crop, into crops at equal distances from its start to its end: (many, 8064).

    So a clip shorter than a crop is in all of them, each time a little later or earlier.
    """
    rest = LENGTH // 4
    sound = nn.functional.pad(sound, (rest, max(0, LENGTH - len(sound))))
    starts = torch.linspace(0, len(sound) - LENGTH, many).long()
    return sound[starts[:, None] + torch.arange(LENGTH)]


@cache
def load(folder: Path = FOLDER) -> Split:
    """Load the crops of the clips of a folder; a clip's class is its name up to the first underscore.

    Raises:
        UserError: there are no clips.
    """
    paths = sorted(folder.glob("*.flac"))
    if not paths:
        raise UserError(f"there are no clips in {str(folder)!r}. Install Debian's package `sonic-pi-samples`.")
    classes = tuple(sorted({path.stem.partition("_")[0] for path in paths}))
    clips = Pictures(
        name="sonic-pi", images=torch.stack([to_pictures(crops(read_clip(path))) for path in paths]),
        labels=torch.tensor([classes.index(path.stem.partition("_")[0]) for path in paths]), classes=classes,
        mirror=torch.zeros(len(paths), dtype=torch.bool),
    )  # fmt: skip
    held_out = torch.arange(len(paths)) % 10 == 9
    return Split(train=_each_crop(clips.select(~held_out)), held_out=_each_crop(clips.select(held_out)))


def _each_crop(clips: Pictures) -> Pictures:
    """From one picture per crop and clip, (N, M, 8, 64, 32), to pictures (N * M, 8, 64, 32)."""
    return Pictures(
        name=clips.name, images=clips.images.flatten(0, 1), labels=clips.labels.repeat_interleave(CROPS),
        classes=clips.classes, mirror=clips.mirror.repeat_interleave(CROPS),
    )  # fmt: skip


def write_wav(folder: Path, pictures: Tensor, names: list[str]) -> None:
    """Write pictures as WAV files, 16 bits, clipped at 1."""
    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    for sound, name in zip(to_sound(pictures.cpu()), names, strict=True):
        soundfile.write(folder / f"{name}.wav", sound.clamp(-1, 1).numpy(), RATE, subtype="PCM_16")


def audio_unet(channels: int, classes: int) -> nn.Module:
    """A UNet of 2.1 M parameters on 32 x 16: a picture's frequencies and frames, in fours."""
    return UNet2DModel(
        sample_size=(32, 16), in_channels=channels, out_channels=channels, block_out_channels=(48, 64, 96),
        layers_per_block=1, norm_num_groups=16, attention_head_dim=32, dropout=0.0,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"), num_class_embeds=classes + 1,
    )  # fmt: skip


class SoundTuning(FineTuning):
    """A training on what a model of sounds sees: `SCALE` times the picture."""

    def _batch(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        clean, cond = super()._batch(generator)
        return clean * SCALE, cond


@dataclass(frozen=True, kw_only=True)
class AudioBase(Base):
    """A model of sounds.

    Attributes:
        folder: where the clips are.
        weights: the file of SonicCNN.
    """

    folder: Path = FOLDER
    weights: Path = WEIGHTS
    tuning: type[FineTuning] = SoundTuning

    @property
    def train(self) -> Pictures:
        return load(self.folder).train

    def classes(self, n: int) -> Tensor:
        """As much of each class as there are training crops."""
        return self.train.labels[torch.linspace(0, len(self.train) - 1, n).long()]

    def finish(self, sample: Tensor) -> Tensor:
        return datasets.to_images(sample / SCALE)

    def measure(self, made: Tensor, labels: Tensor | None, device: str) -> dict[str, float]:
        """Measure pictures of sounds against the training crops: `compare` in SonicCNN's features, and `nearest`.

        No precision and recall: nine in ten nearest neighbours of a crop are of the same clip. `nearest` is the mean distance to the nearest training crop, the root mean square over cube roots of magnitudes; of crops of held-out
        clips it is the measure of what is no copy.
        """
        seen = spectra(made)
        made = network(self.weights, self.null, device)(seen)
        found = compare("SonicCNN", seen_in_training(self, device), made, labels, neighbours=False)
        return found | {"nearest": nearest(known(self), seen[:2000], device)}

    def references(self, device: str, seed: int) -> dict[str, tuple[int, dict[str, float]]]:
        """Halves of the training crops, which are near copies of each other, and crops of clips that are held out."""
        features, logits = seen_in_training(self, device)
        one, other = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).chunk(2)
        halves = compare(
            "SonicCNN",
            (features[one], logits[one]),
            (features[other], logits[other]),
            self.train.labels[other],
            neighbours=False,
        )
        held_out = load(self.folder).held_out
        return {
            "half of the training crops": (len(other), halves),
            "crops of held-out clips": (len(held_out), self.measure(held_out.images, held_out.labels, device)),
        }

    def show(self, made: Tensor, labels: Tensor, path: Path) -> None:
        """Write some as WAV files."""
        some = torch.linspace(0, len(made) - 1, min(len(made), 28)).long()
        names = [f"{i:02d} {self.train.classes[label]}" for i, label in enumerate(labels[some].tolist())]
        write_wav(path, made[some], names)


BASE = AudioBase(name="sonic-unet", dataset="sonic-pi", make=audio_unet, scheduler=ddim, batch=32, n=2000, at_once=50)


class SonicCNN(nn.Module):
    """Spectra, uint8 (B, 1, 128, 64), to features (B, 64) and class logits (B, K)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths, layers = (1, 16, 32, 64, 64), []
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.gather = nn.Sequential(nn.Linear(64 * 8, FEATURES), nn.ReLU())
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.body(images.float() / 64 - 0.5)
        features = self.gather(seen.mean(3).flatten(1))  # the mean over time: which frequencies there are is kept
        return features, self.head(self.drop(features))


def network(path: Path, classes: int, device: str) -> Callable[[Tensor], Seen]:
    """Load the trained SonicCNN: spectra to what it sees in them, on the CPU."""
    from safetensors.torch import load_file

    net = SonicCNN(classes)
    net.load_state_dict(load_file(path))
    net = net.eval().requires_grad_(False).to(device)

    def see(images: Tensor) -> Seen:
        found = [net(part.to(device)) for part in images.split(500)]
        return torch.cat([f for f, _ in found]).cpu(), torch.cat([c for _, c in found]).cpu()

    return see


def train_network(path: Path, split: Split, *, steps: int = 1000, batch: int = 64, seed: int = 0) -> dict[str, Any]:
    """Train SonicCNN on the classes of the training clips, write its weights, and say what it reaches on crops of either set."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    net, images = SonicCNN(len(split.train.classes)).train(), spectra(split.train.images)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(0, len(images), (batch,))
        loss = nn.functional.cross_entropy(net(images[index])[1], split.train.labels[index], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    save_file(net.state_dict(), path)
    see, right = network(path, len(split.train.classes), "cpu"), {}
    for name, part in (("training", split.train), ("held-out", split.held_out)):
        right[f"{name} accuracy"] = float((see(spectra(part.images))[1].argmax(1) == part.labels).float().mean())
    return {"steps": steps, "batch": batch, "seed": seed, **right}


@cache
def known(base: AudioBase) -> Tensor:
    """The spectra of the training crops."""
    return spectra(base.train.images)


@cache
def seen_in_training(base: AudioBase, device: str) -> Seen:
    """What SonicCNN sees in the training crops."""
    return network(base.weights, base.null, device)(known(base))


def main() -> None:
    """Train SonicCNN, and write what it reaches."""
    about = {"command": "python benchmarks/evidence/_audio.py"} | train_network(WEIGHTS, load())
    about |= {
        "hardware": f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    WEIGHTS.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    print(about)


if __name__ == "__main__":
    main()
