"""`perceptual-diffusion train`: fine-tune a pipeline of diffusers on a folder of pictures."""

import contextlib
import dataclasses
import io
import json
import shlex
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from perceptual_diffusion.cli import _paths, folders, pipelines
from perceptual_diffusion.cli import config as configs
from perceptual_diffusion.cli._errors import UserError, plain
from perceptual_diffusion.cli.config import Config
from perceptual_diffusion.cli.files import write, write_folder
from perceptual_diffusion.cli.held import disk_error, hold
from perceptual_diffusion.cli.plan import card, plan
from perceptual_diffusion.cli.runlog import Log
from perceptual_diffusion.cli.training import Interrupted, Stop
from perceptual_diffusion.cli.tuning import MADE_BY, Tuning

SAMPLES = 8
SAMPLING_STEPS = 25
COLUMNS = 4
EARLIEST = {".config.json.tmp"}
"""What a run leaves that is killed before it writes its config.json."""
MEMORY = (
    "the memory is not enough. What helps, in [training]: a smaller `batch` with more `accumulate`, `gradient_checkpointing` = true, `precision` = \"bf16\", "
    "`lora_rank`; in [objective]: `micro_batch` = 1, `teacher` = \"lora\" (with `lora_rank`), `teacher_dtype` = \"bfloat16\"."
)  # fmt: skip


def run(path: Path, *, resume: bool = False, dry_run: bool = False) -> bool:
    """Train as a config file says.

    Args:
        path: the config file.
        resume: go on with the run in its `out`.
        dry_run: print the plan, write nothing.

    Returns:
        whether it was finished; False if it was interrupted and can be resumed.

    Raises:
        UserError: something that the user can mend.
    """
    config = configs.load(path)
    out = Path(config.out)
    accelerator = _accelerator(config)
    try:
        with Stop().listening() as stop, warnings.catch_warnings(), contextlib.ExitStack() as stack:
            if not dry_run:
                _hold(out, Path(config.data), resume, accelerator, stack)
            warnings.simplefilter("ignore")  # of the model and of its libraries
            if accelerator.num_processes > 1:  # a launcher passes Ctrl-C on as a second signal
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, lambda *_: setattr(stop, "asked", True))
            _Run(config, accelerator, stop, path).go(resume, dry_run)
    except (Interrupted, KeyboardInterrupt):
        kept = (out / "state" / "latest.safetensors").exists()
        accelerator.print(
            "Stopped. Go on with the same command and --resume." if kept else "Stopped; nothing was saved yet."
        )
        return False
    except torch.OutOfMemoryError as error:
        raise UserError(MEMORY) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # a CPU's
            raise UserError(MEMORY) from error
        raise
    except OSError as error:
        raise disk_error(error, out / "config.json") from error
    finally:
        accelerator.end_training()
    return True


def _hold(out: Path, data: Path, resume: bool, accelerator: Any, stack: contextlib.ExitStack) -> None:
    """Keep other runs out of `out`; where that is refused, every process of this run ends."""
    from accelerate.utils import gather_object

    refused = []
    if accelerator.is_main_process:
        try:
            stack.enter_context(hold(out, lambda: _check_out(out, data, resume)))
        except (UserError, OSError) as error:
            refused = [str(error)]
    if told := gather_object(refused):
        raise UserError(told[0])


def _accelerator(config: Config) -> Any:
    try:
        from accelerate import Accelerator, DistributedType
    except ImportError as error:
        raise UserError(
            "`train` needs accelerate, which is not installed. Run `pip install 'perceptual-diffusion[train]'`."
        ) from error
    training = config.training
    try:
        accelerator = Accelerator(mixed_precision=training.precision, gradient_accumulation_steps=training.accumulate)
    except ValueError as error:
        raise UserError(
            f"`precision` is {training.precision!r}, which cannot be used here: {error}. Use 'no' or 'bf16'."
        ) from error
    accelerator.gradient_accumulation_steps = training.accumulate  # a launcher's environment would go before it
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in sharded:
        raise UserError(f"accelerate is set to {accelerator.distributed_type.value}; `train` keeps whole weights in each process. Use plain multi-GPU.")  # fmt: skip
    return accelerator


def _check_out(out: Path, data: Path, resume: bool) -> None:
    """Refuse a folder that holds something else, or that lies among the data."""
    state, mark = out / "state" / "latest.safetensors", _paths.mark(out / "config.json", MADE_BY)
    if out.exists() and not out.is_dir():
        raise UserError(f"`out` is {str(out)!r}, which is a file. Give a folder.")
    if out.resolve().is_relative_to(data.resolve()):
        raise UserError(
            f"`out` is {str(out)!r}, which lies in `data`: samples would be trained on. Give another folder."
        )
    if resume and not state.exists():
        if mark is None:
            raise UserError(f"there is nothing to resume in {str(out)!r}. Run without --resume.")
        if mark.get("saved") is not False:
            raise UserError(
                f"the state {str(state)!r} is missing or damaged. Put it back, or start again with another `out`."
            )
    if not resume and out.exists() and {entry.name for entry in out.iterdir()} - EARLIEST:
        hint = "Continue it with --resume, or give" if mark else "Give"
        held = "an earlier run" if mark else "other files"
        raise UserError(f"`out` is {str(out)!r}, which holds {held}. {hint} a new or an empty folder.")


class _Run:
    """A run: what is read, said and written around the loop."""

    def __init__(self, config: Config, accelerator: Any, stop: Stop, path: Path) -> None:
        from rich.console import Console

        self.config, self.accelerator, self.stop, self.path = config, accelerator, stop, path
        self.out = Path(config.out)
        self.console = Console(stderr=True, quiet=not accelerator.is_main_process)
        self.state = self.out / "state" / "latest.safetensors"
        self.finished: int | None = None

    def go(self, resume: bool, dry_run: bool) -> None:
        """Do all of it."""
        training = self.config.training
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(training.precision, torch.float32)
        wanted = pipelines.wanted(self.config.model)
        with self.console.status("reading the pictures"):  # before the model, which takes longer
            folder = folders.read(Path(self.config.data), wanted)
        self._say_left_out(folder)
        self.stop.check()
        loaded = pipelines.load(self.config.model, half if training.lora_rank else torch.float32)
        tuning = Tuning(self.config, loaded, folder, self.accelerator)
        if dry_run:
            self.accelerator.print(plan(self.config, tuning, tuning.check()))
            return
        resumed = resume and self.state.exists()
        if resumed:
            tuning.load(self.state)
            self.finished = (_paths.mark(self.out / "config.json", MADE_BY) or {}).get("finished")
            if tuning.done >= training.steps and tuning.done == self.finished and (self.out / "model").exists():
                raise UserError(
                    f"the run in {str(self.out)!r} is finished, at step {tuning.done}. To go on, raise `steps`."
                )
        else:
            for warning in tuning.check():
                self.console.print(f"warning: {warning}", markup=False, soft_wrap=True)
        self.stop.check()
        self._describe()
        if not resumed:
            self._grid(tuning, "before")
        elif self._has_grid(tuning.done) and not (self.out / "samples" / f"step-{tuning.done}.png").exists():
            self._grid(tuning, f"step-{tuning.done}")  # the kill came before it
        self._loop(tuning)
        self._finish(tuning)
        self._say_left_out(folder)
        self.console.print(f"The model is in {self.out / 'model'}.", markup=False, soft_wrap=True)

    def _describe(self) -> None:
        """Write config.json: the config, whether a state was saved, and the step that `model` is of, if there is one."""
        if self.accelerator.is_main_process:
            facts = {"made by": MADE_BY, "saved": self.state.exists(), "finished": self.finished}
            write(self.out / "config.json", json.dumps(facts | dataclasses.asdict(self.config), indent=1))

    def _has_grid(self, step: int) -> bool:
        training = self.config.training
        return bool(training.sample_every) and step % training.sample_every == 0 and step != training.steps

    def _say_left_out(self, folder: folders.Folder) -> None:
        if folder.left_out:
            self.console.print(f"{len(folder.left_out)} files are left out:", markup=False, soft_wrap=True)
            for name in folder.left_out:
                self.console.print(f"  {plain(name)}", markup=False, soft_wrap=True)

    def _loop(self, tuning: Tuning) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        training = self.config.training
        columns = (
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}"),
        )
        batches = tuning.batches()
        with (
            Log(self.out, tuning.done, self.accelerator.is_main_process) as log,
            Progress(*columns, console=self.console) as bar,
        ):
            task = bar.add_task("", total=training.steps, completed=tuning.done, info="")
            while tuning.done < training.steps:
                tuning.step(batches)
                last = tuning.done == training.steps
                if last or tuning.done % training.log_every == 0:
                    row = tuning.scalars()
                    log.write(tuning.done, row)
                    bar.update(task, info=f"L_sp {row['sp']:.4f}  L_mse {row['mse']:.4f}")
                bar.update(task, completed=tuning.done)
                asked = self._asked()
                if asked or last or tuning.done % training.checkpoint_every == 0:
                    first = not self.state.exists()
                    tuning.save(self.state)
                    if first:  # from now on a missing state is a fault
                        self._describe()
                if asked:
                    raise Interrupted
                if self._has_grid(tuning.done):
                    self._grid(tuning, f"step-{tuning.done}")

    def _asked(self) -> bool:
        """Whether any process was asked to stop."""
        if self.accelerator.num_processes == 1:
            return self.stop.asked
        asked = torch.tensor([float(self.stop.asked)], device=self.accelerator.device)
        return bool(self.accelerator.gather(asked).any())

    def _grid(self, tuning: Tuning, name: str) -> None:
        """Write a grid of samples of the averaged weights, from the same noise each time."""
        if self.accelerator.is_main_process:
            from PIL import Image

            loaded, items = tuning.loaded, tuning.folder.items
            shown = [items[index * len(items) // SAMPLES] for index in range(SAMPLES)]
            loaded.pipeline.to(self.accelerator.device)
            with torch.random.fork_rng(), tuning.averaged(), self.accelerator.autocast():
                drawn = loaded.sample(shown, tuning.labels, tuning.side, SAMPLING_STEPS, self.config.training.seed)
            if tuning.captions is not None and tuning.captions.kept:
                for encoder in loaded.encoders:
                    encoder.to("cpu")
            wide, high = drawn[0].size
            sheet = Image.new("RGB", (min(COLUMNS, len(drawn)) * wide, -(-len(drawn) // COLUMNS) * high), "white")
            for index, picture in enumerate(drawn):
                sheet.paste(picture, (index % COLUMNS * wide, index // COLUMNS * high))
            content = io.BytesIO()
            sheet.save(content, "PNG")
            write(self.out / "samples" / f"{name}.png", content.getvalue())
        self.accelerator.wait_for_everyone()

    def _finish(self, tuning: Tuning) -> None:
        """Write the last samples and the model."""
        self._grid(tuning, "after")
        if self.accelerator.is_main_process:
            command = shlex.join(["perceptual-diffusion", *sys.argv[1:]])

            def fill(folder: Path) -> None:
                tuning.loaded.save(folder, bool(self.config.training.lora_rank))
                write(folder / "README.md", card(self.config, tuning, command))

            with tuning.averaged():
                write_folder(self.out / "model", fill)
            self.finished = tuning.done
            self._describe()
        self.accelerator.wait_for_everyone()
