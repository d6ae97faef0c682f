"""What a network sees in a set of pictures: features, class logits, thumbnails, and the files that could not be read."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from perceptual_diffusion.cli import _paths, _pictures, folders, loading, metrics, sample
from perceptual_diffusion.cli._errors import UserError
from perceptual_diffusion.cli.training import Stop

LEAST = 8
"""The smallest set: half of it must have a neighbour of every rank that is asked for."""
THUMBNAIL = 32
"""The extent at which nearest pictures are looked for."""
PIXELS = 2**22
"""How many pixels go through the network at once, at most."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the network saw in a set.

    Attributes:
        features: shape (N, D).
        logits: shape (N, K).
        thumbnails: uint8, shape (N, 3, 32, 32); empty if they are not needed.
        digests: of the pixels of each picture.
        sizes: the sizes of the pictures.
        broken: the files that could not be read, "name: why".
    """

    features: Tensor
    logits: Tensor
    thumbnails: Tensor
    digests: tuple[bytes, ...]
    sizes: tuple[str, ...]
    broken: tuple[str, ...]


def files(root: Path) -> list[Path]:
    """The pictures of a folder; of one that `sample` made, those that it names, and so no grid."""
    record = root / sample.RECORD
    if not record.is_file():
        return folders.pictures(root)
    rows = loading._json(record)
    if "compared" in rows:
        raise UserError(
            f"{str(root)!r} holds the samples of two models. Give one of {', '.join(str(root / name) for name in sample.NAMES)}."
        )
    try:
        names = [Path(row["file"]) for row in rows["pictures"]]
        if not names:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{str(record)!r} was not written by `perceptual-diffusion sample`. Remove it.") from error
    if any(len(name.parts) != 1 or _paths.path(root / name, "`file`").is_symlink() for name in names):
        raise UserError(f"{str(record)!r} names a picture outside of its folder. Give the folder as it was sampled.")
    return [root / name for name in names]


@torch.no_grad()
def see(network: nn.Module, name: str, paths: list[Path], stop: Stop, *, small: bool = False) -> Seen:
    """Take every picture of a set through the network, those of one size together.

    Args:
        network: gives features, or features and logits, of uint8 pictures.
        name: what the set is called.
        paths: its files.
        stop: asked after each batch.
        small: whether thumbnails are made.

    Raises:
        Interrupted: a stop was asked for.
        UserError: too few pictures can be read.
    """
    import numpy as np

    device = next(network.parameters()).device
    waiting: dict[tuple[int, int], list[tuple[int, Tensor]]] = defaultdict(list)
    found: dict[int, tuple[Tensor, ...]] = {}
    sizes, broken, digests = set[tuple[int, int]](), list[str](), list[bytes]()

    def flush(size: tuple[int, int]) -> None:
        images = torch.stack([image for _, image in waiting[size]])
        seen = network(images.to(device))
        features, logits = seen if isinstance(seen, tuple) else (seen, metrics.classify(seen.cpu()))
        little = nn.functional.interpolate(images.float(), THUMBNAIL, mode="bicubic", antialias=True)
        thumbnails = little.clamp(0, 255).round().to(torch.uint8) if small else little[:, :0]
        for row, (index, _) in enumerate(waiting.pop(size)):
            found[index] = features[row].cpu(), logits[row].cpu(), thumbnails[row]
        stop.check()

    with sample.progress() as bar:
        for index, path in enumerate(bar.track(paths, description=f"reading {name}")):
            try:
                picture = _pictures.open_picture(path)
            except OSError as error:
                broken.append(f"{path.name}: {str(error).replace(repr(str(path)), repr(path.name))}")
                continue
            size = picture.size
            sizes.add(size)
            digests.append(hashlib.sha256(f"{size} ".encode() + picture.tobytes()).digest())
            waiting[size].append((index, torch.from_numpy(np.array(picture)).permute(2, 0, 1)))
            if len(waiting[size]) >= max(1, min(64, PIXELS // (size[0] * size[1]))):
                flush(size)
        for size in list(waiting):
            flush(size)
    if len(found) < LEAST:
        why = f"; the first that cannot be read: {broken[0]}" if broken else ""
        raise UserError(
            f"{str(paths[0].parent)!r} holds {len(found)} pictures that can be read, and at least {LEAST} are needed{why}."
        )
    features, logits, thumbnails = (torch.stack(part) for part in zip(*(found[i] for i in sorted(found)), strict=True))
    written = tuple(f"{width} x {height}" for width, height in sorted(sizes))
    return Seen(
        features=features, logits=logits, thumbnails=thumbnails, digests=tuple(digests), sizes=written, broken=tuple(broken)
    )  # fmt: skip
