"""Load what `inspect` is given: a folder of diffusers, a model of the hub, or the user's own code.

A folder names its classes in JSON. They are looked up in the tables of known denoisers and schedulers, and nowhere else;
weights are read from safetensors only.
"""

import importlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from perceptual_diffusion.adapters.diffusers import FAMILIES
from perceptual_diffusion.adapters.schedulers import SCHEDULERS
from perceptual_diffusion.cli import _paths
from perceptual_diffusion.cli._errors import UserError

FORMS = "a folder of diffusers, a hub id such as 'owner/model', or 'module:callable'"
DENOISERS = ("unet", "transformer", "prior")
"""Folders of a pipeline in which its denoiser lies, the first that is there."""
CONFIGS = [
    "model_index.json", "config.json", *(f"{name}/config.json" for name in DENOISERS), "scheduler_config.json",
    "scheduler/scheduler_config.json",
]  # fmt: skip
WIDEST, DEEPEST = 2**24, 4096
"""The largest number in a config, and the largest number of layers, or of entries in a list."""
WEIGHTS = ("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.safetensors.index.json")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What was loaded.

    Attributes:
        make: builds the model, with weights only if it is asked for them.
        scheduler: a scheduler or schedule, or None.
        inputs: the clean sample and the condition, where the user's code gives them.
        from_config: whether the model is made from a config, so that it can be built without memory.
    """

    make: Callable[[bool], nn.Module]
    scheduler: Any
    inputs: tuple[Any, Any] | None
    from_config: bool


def load(name: str) -> Target:
    """Find a model by what the user typed.

    Args:
        name: a folder of diffusers, a hub id, or "module:callable".

    Raises:
        UserError: it cannot be found or read.
    """
    folder = _paths.path(name, "the model")
    if folder.is_dir():
        return _from_folder(folder)
    if folder.is_file():
        raise UserError(f"{name!r} is a file, expected {FORMS}. Give the folder that holds its config.json.")
    if ":" in name:
        return _from_code(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _from_folder(_download(name, CONFIGS), hub=name)
    raise UserError(f"there is no folder {name!r}. Give {FORMS}.")


def call(name: str) -> Any:
    """Call "module:callable", with the working folder on the path; of a model itself, give it.

    Raises:
        UserError: it cannot be imported, or raises.
    """
    module, _, attribute = name.partition(":")
    if not attribute or not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        raise UserError(f"{name!r} is no 'module:callable', such as 'train:build_model' for `build_model` of train.py.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        value: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.split(".")[0]):
            raise UserError(f"{name!r} needs {error.name!r}, which is not installed.") from error
        raise UserError(
            f"there is no module {module!r} here or among the installed packages. Run it where {module}.py is."
        ) from error
    except Exception as error:
        raise UserError(f"{module!r} cannot be imported: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise UserError(f"{module!r} has no {attribute!r}. Name a function in it that takes no argument.")
        value = getattr(value, part)
    if isinstance(value, nn.Module):
        return value
    if not callable(value):
        raise UserError(f"{name!r} is a {type(value).__name__}, expected a function that takes no argument.")
    try:
        return value()
    except Exception as error:  # the user's own
        raise UserError(f"{name!r} raises {type(error).__name__}: {error}") from error


def _from_code(name: str) -> Target:
    value = call(name)
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) not in (1, 3, 4) or not isinstance(parts[0], nn.Module):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise UserError(
            f"{name!r} gives ({kinds}), expected a model, (model, clean, cond), or (model, clean, cond, scheduler)."
        )
    model = parts[0]
    return Target(
        make=lambda weights: model,
        scheduler=parts[3] if len(parts) == 4 else None,
        inputs=(parts[1], parts[2]) if len(parts) > 1 else None,
        from_config=False,
    )


def _from_folder(folder: Path, hub: str | None = None) -> Target:
    """The denoiser of a folder; `hub` is the id from which its weights are fetched when they are asked for."""
    root, index = folder, folder / "model_index.json"
    scheduler = folder / "scheduler"
    if index.is_file():
        listed = _json(index)
        names = [
            key
            for key, value in listed.items()
            if key.isidentifier() and isinstance(value, list) and len(value) == 2 and str(value[1]) in FAMILIES
        ]
        if not names:
            raise UserError(f"{str(index)!r} lists no denoiser that is known. Give the folder of the model itself.")
        folder = folder / next((name for name in DENOISERS if name in names), names[0])
    elif not (scheduler / "scheduler_config.json").is_file():
        near = [folder, folder.parent / "scheduler"]
        scheduler = next((place for place in near if (place / "scheduler_config.json").is_file()), scheduler)
    if not (folder / "config.json").is_file():
        raise UserError(f"{str(folder)!r} holds no config.json or model_index.json. Give {FORMS}.")
    config = _json(folder / "config.json")
    check_sizes(config, folder / "config.json")
    cls = _class(config.get("_class_name"), config, FAMILIES, folder / "config.json")
    public = {key: value for key, value in config.items() if not key.startswith("_")}

    def make(weights: bool) -> nn.Module:
        try:
            if not weights:
                return cls.from_config(public)  # type: ignore[no-any-return]
            if hub is not None:
                inside = "" if folder == root else f"{folder.name}/"
                _download(hub, [f"{inside}{pattern}" for pattern in WEIGHTS])
            options = {"use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False}
            files = [path.name for path in folder.glob("*.safetensors")]
            half = bool(files) and all(".fp16" in file for file in files)
            return cls.from_pretrained(folder, variant="fp16" if half else None, **options)  # type: ignore[no-any-return]
        except Exception as error:  # diffusers, safetensors and JSON each have their own
            raise UserError(f"the model in {str(folder)!r} cannot be made: {type(error).__name__}: {error}") from error

    return Target(make=make, scheduler=_scheduler(scheduler), inputs=None, from_config=True)


def _scheduler(folder: Path) -> Any:
    path = folder / "scheduler_config.json"
    if not path.is_file():
        return None
    config = _json(path)
    check_sizes(config, path)
    cls = _class(config.get("_class_name"), config, SCHEDULERS, path)
    try:
        return cls.from_config({key: value for key, value in config.items() if not key.startswith("_")})
    except Exception as error:
        raise UserError(f"the scheduler of {str(path)!r} cannot be made: {type(error).__name__}: {error}") from error


def _class(name: Any, config: dict[str, Any], table: Any, path: Path) -> Any:
    """The class of a name, if it stands in the table and in the installed diffusers."""
    if name == "Transformer2DModel":  # what old configs call these
        name = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}.get(
            config.get("norm_type", ""), name
        )
    if not isinstance(name, str) or name not in table:
        raise UserError(
            f"{str(path)!r} names the class {str(name)[:80]!r}, which is not among the known ones. For a class of your own, give 'module:callable'."
        )
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            "a folder of diffusers needs diffusers, which is not installed. Run `pip install 'perceptual-diffusion[diffusers]'`."
        ) from error
    if not hasattr(diffusers, name):
        raise UserError(f"diffusers {diffusers.__version__} has no {name}. Run `pip install --upgrade diffusers`.")
    return getattr(diffusers, name)


def check_sizes(config: dict[str, Any], path: Path) -> None:
    """Refuse a config whose numbers or lists are larger than those of any model: they would take all memory, or all time.

    Raises:
        UserError: a value is too large; the message names it.
    """
    todo: list[tuple[str, Any]] = list(config.items())
    for key, value in todo:
        if isinstance(value, dict | list):
            inner = value.items() if isinstance(value, dict) else ((key, item) for item in value)
            todo.extend((str(name), item) for name, item in inner)
        size = len(value) if isinstance(value, list | dict) else value
        deep = isinstance(value, list | dict) or re.search("layers|depth|blocks", key)
        most = DEEPEST if deep and key != "trained_betas" else WIDEST
        if isinstance(size, int) and abs(size) > most:
            what = f"{size} entries long" if isinstance(value, list | dict) else "too large a number"
            raise UserError(
                f"`{key[:80]}` in {str(path)!r} is {what}, expected at most {most}. Use the config of a model as it was released."
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_paths.text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} holds no JSON object. Download it again.")
    return value


def _download(name: str, patterns: list[str]) -> Path:
    """Fetch the files of a hub id that match, and give the folder that they are in."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            "a hub id needs diffusers, which is not installed. Run `pip install 'perceptual-diffusion[diffusers]'`."
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # of the network, of the hub, or of its offline mode
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UserError(
            f"there is no folder {name!r}, and it cannot be fetched from the hub: {type(error).__name__}: {first[:200]} "
            "Give a folder, or connect to a network."
        ) from error
