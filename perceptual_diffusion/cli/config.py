"""What a run of `perceptual-diffusion train` is told: a TOML or JSON file with a closed set of keys.

One frozen dataclass per section; keys, types, defaults, limits and the table of docs/cli.md come from its fields.
"""

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perceptual_diffusion.cli import _paths
from perceptual_diffusion.cli._errors import UserError
from perceptual_diffusion.distances import NAMED as DISTANCES
from perceptual_diffusion.renoising import FORMULATIONS

NO_LIMIT = 2**31 - 1
REQUIRED: Any = dataclasses.MISSING


def _key(default: Any, help: str, *, least: float = 0, most: float = NO_LIMIT, words: tuple[str, ...] = ()) -> Any:
    """A key: its default, what it is, and its limits or the words that it may be."""
    return field(default=default, metadata={"help": help, "least": least, "most": most, "words": words})


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long, how fast and in what precision."""

    steps: int = _key(1000, "steps of the optimizer", least=1)
    batch: int = _key(8, "samples that a process takes through the model at a time", least=1, most=65536)
    accumulate: int = _key(1, "batches whose gradients are added up for a step", least=1, most=65536)
    lr: float = _key(1e-5, "learning rate of AdamW", most=1)
    warmup: int = _key(20, "steps over which the learning rate rises")
    clip: float = _key(1.0, "norm that gradients are clipped to", least=1e-12)
    ema: float = _key(0.99, "decay of the averaged weights, which are what is saved", most=0.999999)
    drop: float = _key(0.1, "share of the samples whose condition is left out", most=1)
    seed: int = _key(0, "seed of data order, noise, dropout and samples")
    precision: str = _key("no", "mixed precision", words=("no", "bf16", "fp16"))
    resolution: int = _key(0, "side of the pictures in pixels; 0: the model's own", most=16384)
    gradient_checkpointing: bool = _key(False, "compute activations again in the backward: less memory, more time")
    lora_rank: int = _key(0, "rank of LoRA layers on the attention; 0: all weights are trained", most=4096)
    workers: int = _key(0, "processes that read pictures", most=256)
    log_every: int = _key(10, "steps between two rows of the log", least=1)
    sample_every: int = _key(500, "steps between two grids of samples; 0: only before and after")
    checkpoint_every: int = _key(500, "steps between two saved states", least=1)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Arguments of `SelfPerceptualObjective.wrap`; the defaults are those of `wrap`."""

    layers: tuple[str, ...] = _key((), "dotted names of the layers to compare; empty: the model's middle")
    teacher: str = _key("copy", "where the frozen weights are", words=("copy", "lora"))
    t_prime: str = _key(
        "contributing",
        "how t' is drawn",
        words=("uniform", "near", "shifted", "logit_normal", "contributing", "clean"),
    )
    distance: str = _key("normalised", "distance of the features", words=tuple(DISTANCES))
    formulation: str = _key("joint", "eq. 12, or eqs. 14 to 17", words=tuple(FORMULATIONS))
    mse_weight: float = _key(1.0, "weight of the MSE of the prediction", most=1e6)
    weight: str = _key("none", "weight of each sample by t", words=("none", "min_snr"))
    micro_batch: int | str = _key(
        "auto", "samples that go through the teacher at a time; none: all, by plain autograd", least=1, words=("auto", "none")
    )  # fmt: skip
    teacher_dtype: str = _key("model", "dtype of a copy's weights", words=("model", "float32", "bfloat16", "float16"))
    compile: bool = _key(False, "run the teacher as one graph of torch.compile")
    t_range: tuple[float, ...] = _key((), "the smallest and the largest t; empty: all", most=1e6)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    model: str = _key(REQUIRED, "folder of a diffusers pipeline, or its hub id")
    data: str = _key(REQUIRED, "folder of pictures")
    out: str = _key(REQUIRED, "folder for what is made")
    training: Training = field(default_factory=Training)
    objective: Objective = field(default_factory=Objective)


def load(path: Path) -> Config:
    """Read a config file; its paths are relative to it.

    Args:
        path: a `.toml` or `.json` file.

    Raises:
        UserError: it cannot be read, or something in it is wrong; the message says where.
    """
    try:
        text = _paths.text(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(
            f"CONFIG is {str(path)!r}, which cannot be read: {reason}. Give a TOML or JSON file."
        ) from error
    try:
        given = _parse(path, text)
    except (ValueError, RecursionError) as error:  # of tomllib, of json, or a duplicate key
        raise UserError(f"{path}: this cannot be read as {path.suffix[1:].upper()}: {error}.") from error
    config: Config = _section(Config, given, _Place(path, text, ""))
    if config.objective.teacher == "lora" and not config.training.lora_rank:
        place = _Place(path, text, "objective")
        raise UserError(f"{place('teacher')}`teacher` is 'lora', but `lora_rank` is 0. Set `lora_rank`, or use 'copy'.")
    base = path.resolve().parent
    model, data, out = (base / _paths.path(getattr(config, name), f"`{name}`") for name in ("model", "data", "out"))
    _paths.refuse_links(out, f"`out` {str(out)!r}")
    hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", config.model) and not model.exists()
    return dataclasses.replace(
        config,
        model=config.model if hub else str(model),
        data=str(data),
        out=str(out),
    )


def table(section: type) -> list[tuple[str, str, str, str]]:
    """Give key, type, default and meaning of a section's keys, as docs/cli.md prints them."""
    rows = []
    for name, kind in typing.get_type_hints(section).items():
        spec = section.__dataclass_fields__[name]  # type: ignore[attr-defined]
        if dataclasses.is_dataclass(kind):
            continue
        default = "" if spec.default is REQUIRED else json.dumps(spec.default)
        words = ", ".join(f'"{word}"' for word in spec.metadata["words"])
        numbers = "number" if kind is float else "whole number" if kind in (int, int | str) else ""
        lists = {tuple[str, ...]: "list of names", tuple[float, ...]: "[low, high]", bool: "true or false"}
        rows.append(
            (
                name,
                " or ".join(filter(None, (numbers, words))) or lists.get(kind, "text"),
                default,
                spec.metadata["help"],
            )
        )
    return rows


def _parse(path: Path, text: str) -> Any:
    if path.suffix == ".toml":
        return tomllib.loads(text)
    if path.suffix == ".json":
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    raise UserError(f"CONFIG is {str(path)!r}, expected a file that ends in .toml or .json.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for index, (name, _) in enumerate(pairs):
        if name in dict(pairs[:index]):
            raise ValueError(f"the key {name!r} is there twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


@dataclass(frozen=True)
class _Place:
    """Where a key stands in the file: "config.toml:7: [training] "."""

    path: Path
    text: str
    section: str

    def __call__(self, key: str) -> str:
        start = 0
        if self.section:
            found = re.search(
                rf'^\s*\[\s*{self.section}\s*\]|"{self.section}"\s*:|^\s*{self.section}\s*[.=]', self.text, re.M
            )
            start = found.start() if found else 0
        found = (
            None
            if not key
            else re.compile(rf'(?:^|[\[{{,.\s])"?{re.escape(key)}"?\s*[]=:.]', re.M).search(self.text, start)
        )
        line = f":{self.text.count(chr(10), 0, found.end()) + 1}" if found else ""
        return f"{self.path}{line}: {f'[{self.section}] ' if self.section else ''}"


def _section(section: Any, given: Any, place: _Place) -> Any:
    """A dataclass of what a file gives for it."""
    if not isinstance(given, dict):
        raise UserError(f"{place(place.section)}this is {_short(given)}, expected a section of keys.")
    kinds = typing.get_type_hints(section)
    values = {}
    for name, value in given.items():
        if name not in kinds:
            others = {
                key: kind for key, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)
            }
            owner = next((key for key, kind in others.items() if name in typing.get_type_hints(kind)), None)
            near = difflib.get_close_matches(name, kinds, 1, 0.5)
            hint = f"It belongs into [{owner}]." if owner else f"Did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{place(name)}unknown key {name!r}. {hint or 'The keys are ' + ', '.join(kinds) + '.'}")
        kind = kinds[name]
        if dataclasses.is_dataclass(kind):
            values[name] = _section(kind, value, _Place(place.path, place.text, name))
        else:
            values[name] = _value(name, value, kind, section.__dataclass_fields__[name].metadata, place)
    for spec in dataclasses.fields(section):
        if spec.default is REQUIRED and spec.default_factory is REQUIRED and spec.name not in values:
            raise UserError(f"{place.path}: `{spec.name}` is missing: {spec.metadata['help']}. Add it.")
    return section(**values)


def _value(name: str, value: Any, kind: Any, spec: Any, place: _Place) -> Any:
    """A value of a key, checked."""

    def wrong(expected: str) -> UserError:
        return UserError(f"{place(name)}`{name}` is {_short(value)}, expected {expected}.")

    if kind is bool:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if not isinstance(value, list) or (inner is float and len(value) not in (0, 2)):
            raise wrong("a list of names" if inner is str else "[low, high]")
        return tuple(_value(name, item, inner, spec, place) for item in value)
    words = spec["words"]
    if isinstance(value, str) and (kind is str or isinstance(kind, types.UnionType)):
        if (words and value not in words) or not value.strip() or "\0" in value:
            near = difflib.get_close_matches(value, words, 1, 0.5)
            raise wrong((f"one of {', '.join(map(repr, words))}" if words else "a name") + (f"; did you mean {near[0]!r}?" if near else ""))  # fmt: skip
        return value
    if kind is str:
        raise wrong(f"one of {', '.join(map(repr, words))}" if words else "a name in quotes")
    whole = kind is not float
    least, most = spec["least"], spec["most"]
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not fits or not (least <= value <= most and math.isfinite(value)):
        raise wrong(" or ".join([f"a {'whole ' if whole else ''}number from {least} to {most}", *map(repr, words)]))
    return value if whole else float(value)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits, which TOML can write in base 16
        return f"a {type(value).__name__} that is too long to be written"
    return text if len(text) <= 60 else f"{text[:57]}..."
