"""Checkpoints of a run under accelerate that appear whole or not at all, and hold what accelerate does not know of."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perceptual_diffusion.objective import SelfPerceptualObjective

NAME = re.compile(r"step-(\d{8,})")
ABOUT = "checkpoint.json"
FULL = re.compile("PytorchStreamWriter|No space left|File too large|unexpected pos")
"""What torch says where a file could not be written."""


class Checkpoints:
    """Save and load a run: accelerate's state, the objective's generator of each process, and averaged weights.

    A checkpoint is written beside its place and renamed, so that a killed run or a full disk leaves the one before. The
    SHA-256 of each file is kept and checked before anything is loaded. Accelerate's own files of optimizer and generators
    are pickles: load checkpoints that you made yourself.

    Args:
        accelerator: an `accelerate.Accelerator` with everything prepared.
        folder: holds one folder per checkpoint, named "step-00001000".
        objective: whose generator is saved, if there is one: a base that is trained by MSE has none.
        average: averaged weights, such as a `torch.optim.swa_utils.AveragedModel`, saved by the main process.
        about: what the run depends on beside its length, such as the names of its model and its data: the teacher is not
            saved, and is another one where a run goes on from another model. A checkpoint of another `about` is refused.
        keep: how many checkpoints stay, the newest ones.

    Raises:
        ValueError: accelerate is set to name checkpoints itself, or `keep` is no whole number of at least 1.
    """

    def __init__(
        self,
        accelerator: Any,
        folder: str | os.PathLike[str],
        *,
        objective: SelfPerceptualObjective | None = None,
        average: nn.Module | None = None,
        about: str = "",
        keep: int = 2,
    ) -> None:
        if accelerator.project_configuration.automatic_checkpoint_naming:
            raise ValueError(
                "`accelerator` names checkpoints itself. Make it with `automatic_checkpoint_naming=False`."
            )
        if not (isinstance(keep, int) and keep >= 1):
            raise ValueError(f"`keep` is {keep!r}, expected a whole number of at least 1.")
        self.accelerator, self.folder, self.keep = accelerator, Path(folder), keep
        self.objective, self.average, self.about = objective, average, about

    def save(self, step: int) -> Path:
        """Save the run as it is after `step` steps. Every process calls this; the files are on a disk that all of them see.

        Raises:
            OSError: a file could not be written, by this process or another one; the checkpoint before is as it was. Or an older
                checkpoint could not be deleted; then the new one is whole.
        """
        place = self.folder / _name(step)
        draft, old = (place.with_name(f".{place.name}.{kind}") for kind in ("tmp", "old"))
        try:
            self._together(lambda: self._begin(draft), everywhere=False)
            self._together(lambda: self._write(draft))
            self._together(lambda: self._publish(draft, place, old, step), everywhere=False)
        except BaseException:
            if self.accelerator.is_main_process:  # a full disk has its space back
                shutil.rmtree(draft, ignore_errors=True)
                self._restore()
            raise
        self._together(self._tidy, everywhere=False)
        return place

    def _together(self, work: Callable[[], None], *, everywhere: bool = True) -> None:
        """Do something on every process, or on the main one while the others wait; where one fails, all raise."""
        from accelerate.utils import gather_object

        failure = None
        try:
            if everywhere or self.accelerator.is_main_process:
                work()
        except OSError as error:
            failure = error
        told = gather_object([] if failure is None else [str(failure)])
        if failure is not None:
            raise failure
        if told:
            raise OSError(f"the checkpoint could not be written by another process: {told[0]}")

    def _begin(self, draft: Path) -> None:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)

    def _publish(self, draft: Path, place: Path, old: Path, step: int) -> None:
        """Give a whole checkpoint its name."""
        self._describe(draft, step)
        self._restore()
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(place, old)
        os.replace(draft, place)
        sync(self.folder)

    def _tidy(self) -> None:
        """Delete what a kill has left, and the oldest checkpoints."""
        for left in self.folder.glob(".step-*"):
            if NAME.fullmatch(left.stem[1:]) and left.suffix in (".tmp", ".old"):
                shutil.rmtree(left)
        for older in [x for x in self._found() if x.is_dir()][: -self.keep]:
            os.replace(older, hidden := older.with_name(f".{older.name}.tmp"))  # half of it is no checkpoint
            shutil.rmtree(hidden)

    def _write(self, draft: Path) -> None:
        """Write the files of this process."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        state = None if self.objective is None else self.objective.rng_state()
        try:
            self.accelerator.save_state(str(draft))
            save_file({} if state is None else {"generator": state}, draft / _generator(self.accelerator.process_index))
            if self.accelerator.is_main_process and self.average is not None:
                # clones: weights that are shared would be refused
                save_file(
                    {k: v.detach().cpu().clone() for k, v in self.average.state_dict().items()},
                    draft / "average.safetensors",
                )
        except SafetensorError as error:  # how safetensors says that a file could not be written
            raise OSError(str(error)) from error
        except RuntimeError as error:
            if not FULL.search(str(error)):
                raise
            raise OSError(f"a file of the checkpoint could not be written: {error}") from error  # torch.save's words

    def _describe(self, draft: Path, step: int) -> None:
        """Write down what a checkpoint holds, when all of it is on the disk itself."""
        for written in (draft, *draft.rglob("*")):
            sync(written)
        files = {str(x.relative_to(draft)): _digest(x) for x in sorted(draft.rglob("*")) if x.is_file()}
        about = {"step": step, "processes": self.accelerator.num_processes, "about": self.about, "files": files}
        (draft / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        sync(draft / ABOUT)

    def _restore(self) -> None:
        """Give a checkpoint its place back whose replacement was killed between the two renames."""
        for old in self.folder.glob(".step-*.old"):
            if NAME.fullmatch(old.stem[1:]) and not (place := old.with_name(old.stem[1:])).exists():
                os.replace(old, place)

    def load(self) -> int:
        """Load the newest checkpoint. Every process calls this, after everything is prepared.

        Returns:
            the step it was saved at; 0 if there is none.

        Raises:
            ValueError: it is damaged, or was saved by another number of processes.
        """
        from accelerate.utils import gather_object
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if self.accelerator.is_main_process:
            self._restore()
        self.accelerator.wait_for_everyone()
        found = self._found()
        if not found:
            return 0
        place, here = found[-1], self.accelerator.num_processes
        try:
            about = json.loads((place / ABOUT).read_text())
            step, processes, files = int(about["step"]), int(about["processes"]), dict(about["files"])
            if place.name != _name(step):
                raise ValueError(f"it says that it is of step {step}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the checkpoint {str(place)!r} cannot be read: {error}. Delete it to go on from the one before."
            ) from error
        shares = sorted(files)[self.accelerator.process_index :: here]  # each process reads some
        wrong = gather_object([name for name in shares if not _whole(place / name, files[name])])
        if wrong:
            raise ValueError(
                f"the checkpoint {str(place)!r} is damaged: {', '.join(wrong)} are missing, cut short or changed. "
                "Delete it to go on from the one before."
            )
        if processes != here:
            raise ValueError(
                f"the checkpoint {str(place)!r} was saved by {processes} processes, and this run has {here}."
            )
        if about.get("about") != self.about:
            raise ValueError(
                f"the checkpoint {str(place)!r} is of {about.get('about')!r}, and this run of {self.about!r}. "
                "Use the same, or another folder."
            )
        if ("average.safetensors" in files) != (self.average is not None):
            raise ValueError(f"the checkpoint {str(place)!r} and this run differ in whether weights are averaged.")
        try:
            self.accelerator.load_state(str(place))
            state = load_file(place / _generator(self.accelerator.process_index)).get("generator")
            if self.average is not None:
                self.average.load_state_dict(load_file(place / "average.safetensors"))
        except SafetensorError as error:
            raise ValueError(
                f"the checkpoint {str(place)!r} is damaged: {error}. Delete it to go on from the one before."
            ) from error
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"the checkpoint {str(place)!r} does not fit this run's model: {error}") from error
        if self.objective is not None:
            self.objective.set_rng_state(state, torch.device(self.accelerator.device))
        return step

    def _found(self) -> list[Path]:
        """The checkpoints, the newest last."""
        if not self.folder.is_dir():
            return []
        return sorted((x for x in self.folder.iterdir() if NAME.fullmatch(x.name)), key=lambda x: int(x.name[5:]))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _generator(process: int) -> str:
    return f"objective-{process}.safetensors"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _whole(path: Path, known: str | int) -> bool:
    """Whether a file is as it was saved: by its digest, or by its size in checkpoints of version 0.1."""
    if not path.is_file():
        return False
    return path.stat().st_size == known if isinstance(known, int) else _digest(path) == known


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk itself, so that a rename cannot get there before what it names."""
    windows = os.name == "nt"  # which opens no folders, and syncs only what is opened to be written
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
