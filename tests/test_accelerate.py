"""Checkpoints under accelerate: whole or not at all, complete, and continued to the bit."""

import json
import os
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from models import ConvNet
from paper import PaperObjective
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from perceptual_diffusion import adapters, schedules


class Run:
    """A short training, everything of it seeded but what a checkpoint has to bring back."""

    def __init__(self, folder, seed=0, average=True, about="", width=6):
        torch.manual_seed(seed)
        model = ConvNet(width=width)
        self.objective = PaperObjective.wrap(
            model, schedules.Linear(), prediction="flow_prediction", layers=["body"], seed=seed
        )
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)) if average else None
        self.accelerator = Accelerator(cpu=True)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-2))
        self.checkpoints = adapters.Checkpoints(
            self.accelerator, folder, objective=self.objective, average=self.average, about=about
        )

    def steps(self, first, last):
        for step in range(first, last):
            clean = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            self.accelerator.backward(self.objective(self.model, clean))
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
        return self

    def weights(self):
        both = [self.model] + ([self.average] if self.average is not None else [])
        return [value.detach().clone() for module in both for value in module.state_dict().values()]


def test_a_loaded_run_ends_as_an_uninterrupted_one(tmp_path):
    whole = Run(tmp_path / "a").steps(0, 6)
    Run(tmp_path / "b").steps(0, 3).checkpoints.save(3)
    later = Run(tmp_path / "b")  # the teacher is of the model as it was wrapped: the same base
    assert later.checkpoints.load() == 3
    later.steps(3, 6)
    assert all(torch.equal(*pair) for pair in zip(whole.weights(), later.weights(), strict=True))


def test_there_is_nothing_to_load_at_first(tmp_path):
    assert Run(tmp_path / "none").checkpoints.load() == 0


def test_the_newest_is_loaded_and_the_last_two_are_kept(tmp_path):
    run = Run(tmp_path)
    for step in (1, 2, 10):
        run.checkpoints.save(step)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    assert run.checkpoints.load() == 10


def test_saving_a_step_again_replaces_it(tmp_path):
    run = Run(tmp_path)
    run.checkpoints.save(1)
    run.steps(0, 1).checkpoints.save(1)
    trained = run.weights()
    assert [x.name for x in tmp_path.iterdir()] == ["step-00000001"]
    other = Run(tmp_path, seed=5)
    other.checkpoints.load()
    assert all(torch.equal(*pair) for pair in zip(trained, other.weights(), strict=True))


def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.checkpoints.save(1)
    monkeypatch.setattr(run.accelerator, "save_state", lambda folder: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run.checkpoints.save(2)
    assert run.checkpoints.load() == 1


WORK = ["_begin", "_write", "_publish", "_tidy"]


def failing(rank, path, results):
    """A process of two, of which the first cannot write."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"}
    given = {"init_method": f"file://{path}/store", "rank": rank, "world_size": 2, "timeout": timedelta(seconds=30)}
    torch.distributed.init_process_group("gloo", **given)
    run = Run(Path(path) / "run")
    assert run.accelerator.num_processes == 2
    run.checkpoints.save(1)
    told = {}
    for where in WORK:
        full = OSError(f"disk full in {where}") if rank == 0 else None
        if full is not None:
            setattr(run.checkpoints, where, lambda *given, full=full: (_ for _ in ()).throw(full))
        try:
            run.checkpoints.save(2)
        except OSError as error:
            told[where] = str(error), run.checkpoints.load()
        vars(run.checkpoints).pop(where, None)
    results[rank] = told
    torch.distributed.destroy_process_group()


def test_where_one_process_cannot_write_all_raise_and_none_waits(tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(failing, (str(tmp_path), results), nprocs=2)
        found = dict(results)
    for where in WORK:
        there = 2 if where == "_tidy" else 1
        assert found[0][where] == (f"disk full in {where}", there)
        assert found[1][where] == (
            f"the checkpoint could not be written by another process: disk full in {where}",
            there,
        )


def damaged(place, how):
    if how == "cut short":
        (file := place / "model.safetensors").write_bytes(file.read_bytes()[:-8])
    elif how == "without the generators of accelerate":
        (place / "random_states_0.pkl").unlink()
    elif how == "without the objective's generator":
        (place / "objective-0.safetensors").unlink()
    elif how == "without its description":
        (place / "checkpoint.json").unlink()
    elif how == "with half a description":
        (place / "checkpoint.json").write_text("{")


@pytest.mark.parametrize(
    "how",
    [
        "cut short",
        "without the generators of accelerate",
        "without the objective's generator",
        "without its description",
        "with half a description",
    ],
)
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path, how):
    run = Run(tmp_path).steps(0, 1)
    damaged(run.checkpoints.save(1), how)
    before = run.steps(1, 2).weights()
    with pytest.raises(ValueError, match="go on from the one before"):
        run.checkpoints.load()
    assert all(torch.equal(*pair) for pair in zip(before, run.weights(), strict=True))


def test_another_number_of_processes_is_refused(tmp_path):
    run = Run(tmp_path)
    about = run.checkpoints.save(1) / "checkpoint.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"processes": 2}))
    with pytest.raises(ValueError, match="saved by 2 processes"):
        run.checkpoints.load()


def test_a_checkpoint_without_the_average_is_refused(tmp_path):
    Run(tmp_path, average=False).checkpoints.save(1)
    with pytest.raises(ValueError, match="whether weights are averaged"):
        Run(tmp_path).checkpoints.load()


def test_what_a_killed_run_left_is_no_checkpoint(tmp_path):
    run = Run(tmp_path)
    place = run.checkpoints.save(1)
    shutil.copytree(place, tmp_path / ".step-00000002.tmp")
    os.remove(tmp_path / ".step-00000002.tmp/checkpoint.json")
    assert run.checkpoints.load() == 1
    run.checkpoints.save(2)
    assert run.checkpoints.load() == 2


def test_names_given_by_accelerate_are_refused(tmp_path):
    accelerator = Accelerator(
        cpu=True,
        project_config=ProjectConfiguration(project_dir=str(tmp_path), automatic_checkpoint_naming=True),
    )
    with pytest.raises(ValueError, match="automatic_checkpoint_naming=False"):
        adapters.Checkpoints(accelerator, tmp_path, objective=Run(tmp_path).objective)


def test_a_run_without_an_objective_is_saved_too(tmp_path):
    run = Run(tmp_path)
    run.checkpoints.objective = None
    run.checkpoints.save(4)
    assert run.checkpoints.load() == 4


def test_a_checkpoint_of_another_base_is_refused(tmp_path):
    Run(tmp_path, about="base a").checkpoints.save(1)
    with pytest.raises(ValueError, match="is of 'base a', and this run of 'base b'"):
        Run(tmp_path, about="base b").checkpoints.load()
    assert Run(tmp_path, about="base a").checkpoints.load() == 1


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    Run(tmp_path).checkpoints.save(1)
    with pytest.raises(ValueError, match="does not fit this run's model"):
        Run(tmp_path, width=8).checkpoints.load()


def test_what_a_kill_between_two_renames_left_does_not_stop_the_next_save(tmp_path):
    run = Run(tmp_path)
    run.checkpoints.save(1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000001.old")
    run.checkpoints.save(1)
    assert [x.name for x in tmp_path.iterdir()] == ["step-00000001"]
    assert run.checkpoints.load() == 1
