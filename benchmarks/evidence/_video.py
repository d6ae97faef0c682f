"""Short clips of games of Freedoom, a small denoiser of them, and what its samples are measured by.

ViZDoom (`pip install vizdoom`; MIT, Freedoom's art BSD-3-Clause) renders them without a screen: rendered video, not filmed. Every
clip is a walk of half a second from another place of one of 68 maps, at its own speed and turn, among monsters that move.
"""

import contextlib
import io
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _measures
import numpy as np
import torch
from _bases import Base, ddim
from diffusers import UNet3DConditionModel
from torch import Tensor, nn
from tqdm import tqdm

from perceptual_diffusion.cli import datasets, metrics
from perceptual_diffusion.cli.files import load_state, save_state, write
from perceptual_diffusion.cli.training import FineTuning

CACHE = Path(__file__).parents[2] / "runs/evidence/freedoom.safetensors"
FRAMES, SIZE = 8, 32
TICS = 2
"""Of the game's 35 a second, how many pass from frame to frame."""
MAPS = (*(f"E{e}M{m}" for e in range(1, 5) for m in range(1, 10)), *(f"MAP{m:02}" for m in range(1, 33)))
CELL = 512
"""Maps are held out by squares of this side; a walk is shorter than half of it."""
COUNTS = (120, 15)
"""Clips of one map for training, and held out."""


# --- data -----------------------------------------------------------------------------------------------------------------


@cache
def load(path: Path = CACHE) -> datasets.Split:
    """Load the clips, uint8, shape (N, 8, 3, 32, 32); the class is the map. Where the file is missing it is made, in minutes.

    No clip that is held out begins in a square of the map in which one of the training set begins.
    """
    if not path.exists():
        made = [render(name) for name in tqdm(MAPS, desc="rendering Freedoom", mininterval=5)]
        parts = {"train": [m[0][0] for m in made], "held_out": [m[1][0] for m in made]}
        save_state(path, {k: torch.cat(v) for k, v in parts.items()}, {"maps": MAPS, "vizdoom": version("vizdoom")})
    tensors, meta = load_state(path)

    def clips(part: str) -> datasets.Pictures:
        images, maps = tensors[part], meta["maps"]
        labels = torch.arange(len(maps)).repeat_interleave(len(images) // len(maps))
        still = torch.zeros(len(images), dtype=torch.bool)
        return datasets.Pictures(name="freedoom", images=images, labels=labels, classes=tuple(maps), mirror=still)

    return datasets.Split(train=clips("train"), held_out=clips("held_out"))


def render(name: str, counts: tuple[int, int] = COUNTS, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Render clips of one map.

    Args:
        name: the map.
        counts: how many clips for training, and held out.
        seed: of the game and of the walks; the same gives the same clips.

    Returns:
        for training, and held out: the clips, uint8, shape (N, 8, 3, 32, 32), and the squares they begin in, shape (N, 2).
    """
    rng = np.random.default_rng([seed, *name.encode()])
    with _game(name, seed) as game:
        cells: dict[tuple[float, float], list[tuple[float, float]]] = {}
        for x, y in sorted({(thing.position_x, thing.position_y) for thing in game.get_state().objects}):
            cells.setdefault((x // CELL, y // CELL), []).append((x, y))
        order = [list(cells)[i] for i in rng.permutation(len(cells))]
        last = max(1, len(order) // 6)
        made = []
        for count, part in zip(counts, (order[:-last], order[-last:]), strict=True):
            clips, begun = [], []
            for _ in range(20 * count):
                cell = part[rng.integers(len(part))]
                clip = _walk(game, cells[cell][rng.integers(len(cells[cell]))], rng)
                if clip is not None and _moves(clip):
                    clips.append(clip)
                    begun.append(cell)
                if len(clips) == count:
                    break
            else:
                raise RuntimeError(f"the map {name} gave {len(clips)} clips that move, of {count}.")
            made.append((torch.stack(clips), torch.tensor(begun)))
    return made


@contextlib.contextmanager
def _game(name: str, seed: int) -> Any:
    """A game on a map, without a screen; it writes its settings into the working folder, so it gets one of its own."""
    import vizdoom as viz

    game = viz.DoomGame()
    game.set_doom_game_path(str(Path(viz.root_path) / ("freedoom2.wad" if name.startswith("MAP") else "freedoom1.wad")))
    game.set_doom_map(name)
    game.set_seed(seed)
    game.set_window_visible(False)
    game.set_screen_resolution(viz.ScreenResolution.RES_160X120)
    game.set_screen_format(viz.ScreenFormat.RGB24)
    for part in ("hud", "weapon", "crosshair", "messages", "screen_flashes"):
        getattr(game, f"set_render_{part}")(False)
    game.set_objects_info_enabled(True)
    moves = ("MOVE_FORWARD_BACKWARD_DELTA", "MOVE_LEFT_RIGHT_DELTA", "TURN_LEFT_RIGHT_DELTA")
    game.set_available_buttons([getattr(viz.Button, move) for move in moves])
    game.set_episode_timeout(10**6)
    game.add_game_args("+sv_cheats 1 +con_midtime 0 +cl_showsecretmessage 0")  # cheats move us; no words on the screen
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        game.init()
        try:
            game.send_game_command("god")
            yield game
        finally:
            game.close()


def _walk(game: Any, place: tuple[float, float], rng: np.random.Generator) -> Tensor | None:
    """One clip, uint8, shape (8, 3, 32, 32); None if the map ended on the way."""
    frames = []
    game.send_game_command(f"warp {place[0]:.0f} {place[1]:.0f}")
    game.make_action([0, 0, rng.uniform(-180, 180)], 3)
    move = [rng.uniform(-5, 25), rng.normal(0, 6), rng.normal(0, 3)]
    for _ in range(FRAMES):
        if game.is_episode_finished():
            game.new_episode()
            game.send_game_command("god")
            return None
        frames.append(torch.from_numpy(game.get_state().screen_buffer[:, 20:140].copy()))
        game.make_action(move, TICS)
    pixels = torch.stack(frames).permute(0, 3, 1, 2).float()
    return nn.functional.interpolate(pixels, SIZE, mode="area").round().to(torch.uint8)


def _moves(clip: Tensor) -> bool:
    """Whether every frame differs from the next, and there is something to see."""
    steps = clip.float().diff(dim=0).abs().mean((1, 2, 3))
    return bool(steps.min() > 1) and bool(clip.float().std() > 12)


# --- model ----------------------------------------------------------------------------------------------------------------


def to_model(clips: Tensor) -> Tensor:
    """Turn uint8 clips (B, F, 3, H, W) into what the model sees: [-1, 1], 2 x 2 pixels as channels, (B, 12, F, H / 2, W / 2)."""
    return datasets.to_model(clips).transpose(1, 2)


def to_clips(sample: Tensor) -> Tensor:
    """Undo `to_model`, clamped."""
    return datasets.to_images(sample.transpose(1, 2))


class ClipUNet(UNet3DConditionModel):
    """diffusers' UNet of space and time without a text: its attention to text gets a zero."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
        return super().forward(sample, timestep, sample.new_zeros(len(sample), 1, self.config.cross_attention_dim))


def unet3d(channels: int, classes: int, widths: tuple[int, int, int] = (32, 64, 64)) -> nn.Module:
    """A UNet of 2.2 M parameters on 8 x 16 x 16, with convolutions and attention over time."""
    model = ClipUNet(
        sample_size=SIZE // 2, in_channels=channels, out_channels=channels, block_out_channels=widths,
        layers_per_block=1, norm_num_groups=8, attention_head_dim=4, cross_attention_dim=8,
        down_block_types=("DownBlock3D", "DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D", "UpBlock3D"),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # 0.1 in the convolutions over time
            module.p = 0.0
    return model


class ClipTuning(FineTuning):
    """A training that draws clips."""

    def _batch(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.randint(0, len(self.images), (self.batch,), device=self.device, generator=generator)
        return to_model(self.images[index]), {}


class ClipBase(Base):
    """A model of clips, without classes."""

    @property
    def train(self) -> datasets.Pictures:
        return load().train

    @property
    def shape(self) -> tuple[int, ...]:
        return 3 * 4, FRAMES, SIZE // 2, SIZE // 2

    @property
    def null(self) -> int:
        return len(MAPS)

    def finish(self, sample: Tensor) -> Tensor:
        return to_clips(sample)

    def measure(self, made: Tensor, labels: Tensor | None, device: str) -> dict[str, float]:
        return measure(made, device)

    def references(self, device: str, seed: int) -> dict[str, tuple[int, dict[str, float]]]:
        """Clips of the training set, as if they were samples; `nearest` is that of clips that are held out."""
        some = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))[: self.n]
        near = nearest(load().held_out.images, device)
        return {"training clips": (len(some), measure(self.train.images[some], device) | {"nearest": near})}

    def show(self, made: Tensor, labels: Tensor, path: Path) -> None:
        """Write some as a moving picture."""
        write_gif(made[:32], path.with_name(f"{path.name}.gif"))


BASE = ClipBase(
    name="freedoom-unet3d", dataset="freedoom", make=unet3d, scheduler=ddim, drop=1.0, steps=10000, batch=16, lr=5e-4,
    decay=0.999, n=1020, at_once=20, tuning=ClipTuning,
)  # fmt: skip


# --- samples --------------------------------------------------------------------------------------------------------------


def see(clips: Tensor, device: str) -> dict[str, Tensor]:
    """Give the features of uint8 clips (N, F, 3, H, W) by what they tell, one of each clip: its frames are near copies.

    Returns:
        `EffLite0-frames`: EfficientNet-Lite0's pooled features of a frame, shape (N, 1280); `EffLite0-motion`: their difference from
        a frame to the next, shape (N, 1280), which is 0 in a clip that stands still. Clips take their turns in which frame it is.
    """
    network, clip = _measures.network("EffLite0", device), torch.arange(len(clips))
    first = clip % (clips.shape[1] - 1)
    before, after = (network(clips[clip, at])[0] for at in (first, first + 1))
    return {"EffLite0-frames": network(clips[clip, clip % clips.shape[1]])[0], "EffLite0-motion": after - before}


@cache
def real(device: str) -> dict[str, Tensor]:
    """What is seen in the clips that are held out."""
    return see(load().held_out.images, device)


def measure(clips: Tensor, device: str) -> dict[str, float]:
    """Measure samples, uint8 (N, 8, 3, 32, 32), against the clips that are held out.

    Returns:
        the metrics of `_measures.compare` for each part of `see`, and `nearest`, the mean distance of a clip to the nearest of
        the training set: root mean square over its pixels, of the pixel range.
    """
    found: dict[str, float] = {}
    for name, features in see(clips, device).items():
        found |= _measures.compare(name, (real(device)[name], None), (features, None), None)
    return found | {"nearest": nearest(clips, device)}


def nearest(clips: Tensor, device: str, most: int = 500) -> float:
    """The mean distance of at most so many clips to the nearest of the training set."""
    some = clips[:most].to(device)
    found = [metrics.nearest(part.to(device), some) for part in load().train.images.split(1000)]
    return float(torch.stack(found).min(0).values.mean())


def write_gif(clips: Tensor, path: Path, columns: int = 8, scale: int = 2) -> None:
    """Write uint8 clips (N, F, 3, H, W) side by side as one moving picture, at the speed of the game."""
    from PIL import Image

    columns = min(columns, len(clips))
    rows = clips[: len(clips) // columns * columns].unflatten(0, (-1, columns))  # (row, column, F, 3, H, W)
    frames = rows.permute(2, 0, 4, 1, 5, 3).flatten(3, 4).flatten(1, 2)  # (F, row H, column W, 3)
    frames = frames.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    first, *others = (Image.fromarray(frame.numpy()) for frame in frames)
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=round(1000 * TICS / 35, -1), loop=0)
    write(path, file.getvalue())
