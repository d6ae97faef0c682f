"""Checkpoints of a run under accelerate that appear whole or not at all, and hold what accelerate does not know of."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perceptual_diffusion.objective import SelfPerceptualObjective

NAME = re.compile(r"step-(\d{8,})")
ABOUT = "checkpoint.json"


class Checkpoints:
    """Save and load a run: accelerate's state, the objective's generator of each process, and averaged weights.

    A checkpoint is written beside its place and renamed, so that a killed run leaves the one before. Accelerate's own files
    of optimizer and generators are pickles: load checkpoints that you made yourself.

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
        """Save the run as it is after `step` steps. Every process calls this; the files are on a disk that all of them see."""
        from safetensors.torch import save_file

        accelerator, place = self.accelerator, self.folder / f"step-{step:08d}"
        draft = place.with_name(f".{place.name}.tmp")
        if accelerator.is_main_process:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(draft))
        state = None if self.objective is None else self.objective.rng_state()
        tensors = {} if state is None else {"generator": state}
        save_file(tensors, draft / _generator(accelerator.process_index))
        if accelerator.is_main_process and self.average is not None:
            # clones: weights that are shared would be refused
            save_file(
                {k: v.detach().cpu().clone() for k, v in self.average.state_dict().items()},
                draft / "average.safetensors",
            )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = {str(x.relative_to(draft)): x.stat().st_size for x in sorted(draft.rglob("*")) if x.is_file()}
            about = {"step": step, "processes": accelerator.num_processes, "about": self.about, "files": files}
            (draft / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
            shutil.rmtree(old := draft.with_suffix(".old"), ignore_errors=True)
            if place.exists():
                os.replace(place, old)
            os.replace(draft, place)
            shutil.rmtree(old, ignore_errors=True)
            for older in self._found()[: -self.keep]:
                shutil.rmtree(older)
        accelerator.wait_for_everyone()
        return place

    def load(self) -> int:
        """Load the newest checkpoint. Every process calls this, after everything is prepared.

        Returns:
            the step it was saved at; 0 if there is none.

        Raises:
            ValueError: it is damaged, or was saved by another number of processes.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        found = self._found()
        if not found:
            return 0
        place, here = found[-1], self.accelerator.num_processes
        try:
            about = json.loads((place / ABOUT).read_text())
            step, processes, files = int(about["step"]), int(about["processes"]), dict(about["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the checkpoint {str(place)!r} cannot be read: {error}. Delete it to go on from the one before."
            ) from error
        wrong = [
            name
            for name, size in files.items()
            if not (place / name).is_file() or (place / name).stat().st_size != size
        ]
        if wrong:
            raise ValueError(
                f"the checkpoint {str(place)!r} is damaged: {', '.join(wrong)} are missing or cut short. "
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
        return sorted(
            (x for x in self.folder.iterdir() if x.is_dir() and NAME.fullmatch(x.name)), key=lambda x: int(x.name[5:])
        )


def _generator(process: int) -> str:
    return f"objective-{process}.safetensors"
