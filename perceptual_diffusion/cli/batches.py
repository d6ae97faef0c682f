"""Batches of pictures in an order that depends on the seed and the step alone, so that a run can go on anywhere."""

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from perceptual_diffusion.cli._errors import UserError
from perceptual_diffusion.cli._pictures import open_picture
from perceptual_diffusion.cli.folders import Item
from perceptual_diffusion.cli.pipelines import Batch


class Pictures(Dataset[Batch]):
    """Pictures scaled to `side` by their shorter side, and cut to a square in the middle.

    Args:
        items: where they are.
        side: in pixels.
        channels: 3, or 1 for grey.
    """

    def __init__(self, items: tuple[Item, ...], side: int, channels: int) -> None:
        self.items, self.side, self.mode = items, side, "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Batch:
        """Give one picture as a batch without its first dimension."""
        import numpy as np
        from PIL import Image

        path, side = self.items[index].path, self.side
        try:
            picture = open_picture(path)
        except OSError as error:  # it was whole when the run started
            raise UserError(
                f"the picture {str(path)!r} cannot be read any more: {error}. Mend it, then use --resume."
            ) from error
        width, height = picture.size
        scale = side / min(width, height)
        wide, high = (max(side, round(extent * scale)) for extent in (width, height))
        left, top = (wide - side) // 2, (high - side) // 2
        picture = picture.resize((wide, high), Image.Resampling.LANCZOS).crop((left, top, left + side, top + side))
        pixels = torch.from_numpy(np.array(picture.convert(self.mode))).float() / 127.5 - 1
        pixels = pixels[None] if self.mode == "L" else pixels.permute(2, 0, 1)
        return Batch(pixels=pixels, frames=torch.tensor([height, width, top, left]), index=torch.tensor(index))


class Order(Sampler[list[int]]):
    """The endless order of a process: the pictures shuffled anew each time round, and shared out among the processes.

    Args:
        count: how many pictures there are.
        batch: how many a process takes at a time.
        seed: of the shuffling.
        rank: which process this is, and `processes` how many there are.
        start: the batch to begin with.
    """

    def __init__(self, count: int, batch: int, *, seed: int, rank: int, processes: int, start: int) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self.rank, self.processes, self.start = rank, processes, start

    def __iter__(self) -> Iterator[list[int]]:
        number, epoch, order = self.start, -1, torch.empty(0)
        while True:
            first = (number * self.processes + self.rank) * self.batch
            indices = []
            for place in range(first, first + self.batch):
                if place // self.count != epoch:
                    epoch = place // self.count
                    generator = torch.Generator().manual_seed((self.seed << 32) + epoch)
                    order = torch.randperm(self.count, generator=generator)
                indices.append(int(order[place % self.count]))
            yield indices
            number += 1


def stream(pictures: Pictures, order: Order, workers: int) -> Iterator[Batch]:
    """Give the batches of an order, read by `workers` processes, or by this one if that is 0."""
    loader: Any = DataLoader(
        pictures,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # the loader draws a seed, and not from the run's own stream
    )
    return iter(loader)


def collate(rows: list[Batch]) -> Batch:
    """Put pictures together as a batch."""
    return Batch(**{name: torch.stack([getattr(row, name) for row in rows]) for name in ("pixels", "frames", "index")})


def _leave_signals(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of a terminal's processes; the run itself stops
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
