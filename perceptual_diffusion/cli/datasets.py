"""Small real picture sets: 32 x 32 RGB, with a class each, from this package, from other packages or from a folder."""

import gzip
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from perceptual_diffusion.cli import folders
from perceptual_diffusion.cli._errors import UserError, plain
from perceptual_diffusion.cli._pictures import open_picture

SIZE = 32
LEAST = 4
"""The smallest number of pictures in a folder."""
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures with their classes.

    Attributes:
        name: what the set is called in reports.
        images: uint8, shape (N, 3, 32, 32).
        labels: class indices, int64, shape (N,).
        classes: the names of the classes.
        mirror: whether a picture of this index may be flipped left to right, bool, shape (N,).
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mirror: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def select(self, index: Tensor) -> "Pictures":
        """Keep the pictures at `index` (a mask or positions, shape (N,) or (M,))."""
        return Pictures(
            name=self.name,
            images=self.images[index],
            labels=self.labels[index],
            classes=self.classes,
            mirror=self.mirror[index],
        )


@dataclass(frozen=True, kw_only=True)
class Split:
    """A training set and the pictures held out of it."""

    train: Pictures
    held_out: Pictures
    unreadable: int = 0
    """How many files of a folder could not be read and are left out."""


def to_model(images: Tensor) -> Tensor:
    """Turn uint8 pictures into what the models of this package see.

    Scaled to [-1, 1], then 2 x 2 pixels folded into channels (an exact, invertible rearrangement).

    Args:
        images: uint8, shape (B, 3, H, W), H and W even.

    Returns:
        float32, shape (B, 12, H / 2, W / 2).
    """
    return torch.nn.functional.pixel_unshuffle(images.float() / 127.5 - 1, 2)


def to_images(sample: Tensor) -> Tensor:
    """Undo `to_model`: float, shape (B, 12, h, w), to uint8 pictures, shape (B, 3, 2 h, 2 w), clamped."""
    pixels = torch.nn.functional.pixel_shuffle(sample.float(), 2)
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def load(name: str) -> Split:
    """Load a picture set by name, or a folder of pictures.

    Args:
        name: "emoji", "digits", "fashion-mnist", or a folder (its subfolders are the classes; without any, one class).

    Raises:
        UserError: the set cannot be found or read.
    """
    loaders: dict[str, Callable[[], Split]] = {"emoji": _emoji, "digits": _digits, "fashion-mnist": _fashion_mnist}
    if name in loaders:
        return loaders[name]()
    folder = Path(os.path.expanduser(name))
    try:
        if name and folder.is_dir():
            return _folder(folder)
    except OSError as error:
        raise UserError(f"cannot read the folder {name[:80]!r}: {error.strerror}. Give another folder.") from error
    expected = ", ".join(repr(n) for n in loaders)
    raise UserError(
        f"unknown dataset {name!r}, expected one of {expected}, or a folder of pictures; there is no folder {str(folder)!r}."
    )


def _emoji_rows() -> dict:  # type: ignore[type-arg]
    rows: dict = json.loads((resources.files("perceptual_diffusion") / "assets/emoji/emoji.json").read_text("utf-8"))  # type: ignore[type-arg]
    return rows


def _emoji() -> Split:
    import numpy as np
    from PIL import Image

    table = _emoji_rows()
    with (
        resources.as_file(resources.files("perceptual_diffusion") / "assets/emoji/atlas.webp") as path,
        Image.open(path) as image,
    ):
        atlas = torch.from_numpy(np.array(image.convert("RGB")))
    size, columns, rows = table["size"], table["columns"], table["emoji"]
    tiles = atlas.unflatten(0, (-1, size)).unflatten(2, (columns, size))  # (rows, y, columns, x, rgb)
    images = tiles.permute(0, 2, 4, 1, 3).flatten(0, 1)[: len(rows)].contiguous()
    classes = tuple(dict.fromkeys(row["category"] for row in rows))
    labels = torch.tensor([classes.index(row["category"]) for row in rows])
    mirror = torch.tensor([row["category"] not in ("Flags", "Symbols") for row in rows])
    pictures = Pictures(name="emoji", images=images, labels=labels, classes=classes, mirror=mirror)
    held_out = torch.tensor([row["split"] == "held_out" for row in rows])
    return Split(train=pictures.select(~held_out), held_out=pictures.select(held_out))


def _grey(name: str, images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Pictures:
    """Grey pictures in [0, 255], shape (N, H, W), as 32 x 32 RGB."""
    height = images.shape[-1]
    if height < SIZE // 2:
        images = torch.nn.functional.interpolate(images[:, None].float(), SIZE, mode="bicubic", antialias=True)[:, 0]
    else:
        pad = (SIZE - height) // 2
        images = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    rgb = images.clamp(0, 255).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()
    return Pictures(
        name=name, images=rgb, labels=labels.long(), classes=classes, mirror=torch.zeros(len(rgb), dtype=torch.bool)
    )


def _tenth(pictures: Pictures) -> Split:
    """Hold out every tenth picture, none where there are fewer than ten."""
    held_out = torch.arange(len(pictures)) % 10 == 9
    return Split(train=pictures.select(~held_out), held_out=pictures.select(held_out))


def _digits() -> Split:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the digits come with scikit-learn, which is not installed. Run `pip install scikit-learn`."
        ) from error
    data = load_digits()
    images = torch.from_numpy(data.images).float() * (255 / 16)
    return _tenth(_grey("digits", images, torch.from_numpy(data.target), tuple("0123456789")))


def _idx(path: Path) -> Tensor:
    """Read one IDX file of unsigned bytes (the format of MNIST)."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise UserError(f"{str(path)!r} is no IDX file of unsigned bytes.")
    rank = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    body = bytearray(raw[4 + 4 * rank :])
    if len(body) != math.prod(shape):
        raise UserError(
            f"{str(path)!r} holds {len(body)} bytes, expected {math.prod(shape)} for shape {shape}: it is damaged."
        )
    return torch.frombuffer(body, dtype=torch.uint8).reshape(shape)


def _fashion_mnist() -> Split:
    def read(prefix: str) -> Pictures:
        try:
            images = _idx(folder / f"{prefix}-images-idx3-ubyte.gz")
            labels = _idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"cannot read Fashion-MNIST in {str(folder)!r}: {error}") from error
        return _grey("fashion-mnist", images, labels, FASHION_CLASSES)

    folder = FASHION_MNIST
    if not folder.is_dir():
        folder = _download_fashion_mnist()
    return Split(train=read("train"), held_out=read("t10k"))


def _download_fashion_mnist() -> Path:
    """Fetch Fashion-MNIST with torchvision (needs a network) and return the folder of its files."""
    hint = "Install Debian's package `dataset-fashion-mnist`, or connect to a network."
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError as error:
        raise UserError(f"Fashion-MNIST is not at {FASHION_MNIST}, and torchvision is not installed. {hint}") from error
    root = Path.home() / ".cache" / "perceptual-diffusion"
    try:
        FashionMNIST(root=root, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"Fashion-MNIST is not at {FASHION_MNIST}, and its download failed: {error}. {hint}") from error
    return root / "FashionMNIST" / "raw"


def _folder(folder: Path) -> Split:
    import numpy as np
    from PIL import Image, ImageOps

    paths = folders.pictures(folder)
    classes = tuple(sorted({p.relative_to(folder).parts[0] if p.parent != folder else "" for p in paths}))
    images, labels, unreadable = [], [], []
    for path in paths:
        try:
            rgb = open_picture(path)
        except OSError as error:
            unreadable.append(f"{path.name}: {error}")
            continue
        images.append(
            torch.from_numpy(np.array(ImageOps.fit(rgb, (SIZE, SIZE), Image.Resampling.LANCZOS))).permute(2, 0, 1)
        )
        labels.append(classes.index(path.relative_to(folder).parts[0] if path.parent != folder else ""))
    if len(images) < LEAST:
        raise UserError(
            f"of the {len(paths)} pictures in {str(folder)!r}, {len(images)} could be read and at least {LEAST} are needed; "
            f"the first failures: {'; '.join(unreadable[:3]) or 'none'}."
        )
    pictures = Pictures(
        name=plain(folder.resolve().name),
        images=torch.stack(images),
        labels=torch.tensor(labels),
        classes=tuple(name or "picture" for name in classes),
        mirror=torch.zeros(len(images), dtype=torch.bool),
    )
    split = _tenth(pictures)
    return Split(train=split.train, held_out=split.held_out, unreadable=len(unreadable))
