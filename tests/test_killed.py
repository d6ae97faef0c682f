"""Kill -9, a full disk, Ctrl-C and damaged files: `train`, `demo` and `Checkpoints` go on to the bit, or say what is wrong.

What is killed is a process of its own, at the n-th change that it makes to its folder; the slow tests take every n, and random moments.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pipelines
import pytest
import test_examples
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from killing import WRITES, begin, child, count, end, filled, images, killed, signalled
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from test_accelerate import Run

from perceptual_diffusion.cli import datasets, demo, files, held, train
from perceptual_diffusion.cli._app import app
from perceptual_diffusion.cli._errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
KILLS = 20


@pytest.fixture(scope="module", autouse=True)
def small():
    """Few samples and steps, which the forked processes inherit."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SAMPLES": 2, "SAMPLING_STEPS": 2}.items():
            patch.setattr(train, name, value)
        for name, value in {"BATCH": 4, "BASE_STEPS": 1, "SAMPLING_STEPS": 4}.items():
            patch.setattr(demo, name, value)
        yield


# --- what is written at a time: a file, a state, a folder ---------------------------------------------------------------


def writes(changes):
    """Which changes are files that are opened to be written."""
    return [n for n, kind in enumerate(changes, 1) if kind in WRITES]


def write_file(path, text):
    files.write(path, text)


def write_state(path, text):
    files.save_state(path, {"x": torch.full((100,), len(text))}, {"text": text})


def write_folder(path, text):
    def fill(folder):
        for name in ("a", "b"):
            (folder / name).write_text(text)

    files.write_folder(path, fill)


def read(path):
    """What was written, whole, or an error."""
    if not path.is_dir():
        return path.read_text() if path.suffix == ".txt" else files.load_state(path)[1]["text"]
    one, other = ((path / name).read_text() for name in ("a", "b"))
    assert one == other
    return one


WRITERS = {"a.txt": write_file, "a.safetensors": write_state, "a": write_folder}
OLD, NEW = "old" * 40, "new and longer" * 40


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("torn", [False, True])
def test_a_write_that_is_killed_leaves_the_old_or_the_new_and_the_next_one_no_litter(tmp_path, name, torn):
    write, path = WRITERS[name], tmp_path / name
    write(path, OLD)
    changes = count(tmp_path, write, path, OLD)
    assert len(changes) > 5
    for at in writes(changes) if torn else range(1, len(changes) + 1):
        ended = killed(tmp_path, at, write, path, NEW, torn=torn)
        assert ended.code in ({0, -signal.SIGXFSZ} if torn else {-signal.SIGKILL}), ended
        if path.exists():  # a folder may lie beside its place, until it is written again
            assert read(path) in (OLD, NEW)
        else:
            assert read(tmp_path / f".{name}.old") == OLD
        write(path, OLD)
        assert (read(path), os.listdir(tmp_path)) == (OLD, [name])


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("torn", [False, True])
def test_a_write_on_a_full_disk_leaves_the_old_alone(tmp_path, name, torn):
    write, path = WRITERS[name], tmp_path / name
    write(path, OLD)
    failed, changes = 0, count(tmp_path, write, path, OLD)
    for at in writes(changes) if torn else range(1, len(changes) + 1):
        ended = filled(tmp_path, at, write, path, NEW, torn=torn)
        if ended.code:
            failed += 1
            assert ended.said.splitlines()[-1].startswith("OSError: "), ended.said
        assert read(path) in (OLD, NEW)
        assert os.listdir(tmp_path) == [name]
        write(path, OLD)
    assert failed


# --- damaged states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every_bit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_state_with_any_bit_flipped_or_cut_anywhere_is_refused(tmp_path, every_bit):
    path, draw = tmp_path / "s.safetensors", random.Random(0)
    tensors = {"x": torch.arange(3, dtype=torch.float32), "y": torch.tensor(True), "z": torch.zeros(0, 2).bfloat16()}
    files.save_state(path, tensors, {"key": {"seed": 0}, "done": 3, "name": "ä"})
    good = path.read_bytes()
    assert torch.equal(files.load_state(path)[0]["x"], tensors["x"])
    damaged = [good[:size] for size in range(0, len(good), 1 if every_bit else 9)]
    for byte in range(len(good)):
        for bit in range(8) if every_bit else [draw.randrange(8)]:
            damaged.append(bytearray(good))
            damaged[-1][byte] ^= 1 << bit
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            files.load_state(path)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        files.load_state(path)
    path.mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        files.load_state(path)


def test_a_state_of_version_0_1_without_a_digest_is_still_read(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "s.safetensors", {"state": '{"done": 1}'})
    assert files.load_state(tmp_path / "s.safetensors")[1] == {"done": 1}


# --- train --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny pipeline and pictures."""
    root = tmp_path_factory.mktemp("killed")
    pipelines.write("ddpm", root / "model")
    pipelines.pictures(root / "data", layout="bare")
    return root


def exact(paths):
    """The pictures and weights among some files; safetensors orders what it says of them by chance."""
    found = {path.name: path.read_bytes() for path in paths if path.suffix == ".png"}
    for path in (path for path in paths if path.suffix == ".safetensors"):
        with safe_open(path, "pt") as file:
            found[path.name] = file.metadata(), {k: file.get_tensor(k).numpy().tobytes() for k in file.keys()}  # noqa: SIM118
    return found


class Training:
    """`train` in a folder; its states fall between two rows of the log."""

    def __init__(self, root, out):
        self.out, self.path = out, out.with_suffix(".json")
        training = {
            "steps": 3, "batch": 2, "lr": 1e-3, "warmup": 0, "resolution": 8, "workers": 0,
            "log_every": 2, "checkpoint_every": 1, "sample_every": 2,
        }  # fmt: skip
        facts = {"model": str(root / "model"), "data": str(root / "data"), "out": str(out), "training": training}
        self.path.write_text(json.dumps(facts))

    def __call__(self, *options):
        AcceleratorState._reset_state(True)
        app(["train", str(self.path), *options])

    def made(self):
        """What must not depend on where it was killed."""
        kept = [p for p in self.out.rglob("*") if p.is_file() and "tensorboard" not in p.parts]
        log = [json.loads(line) | {"seconds": 0} for line in (self.out / "log.jsonl").read_text().splitlines()]
        return {"log": log, "exact": exact(kept), "names": sorted(str(p.relative_to(self.out)) for p in kept)}


class Demonstration(Training):
    """`demo` in a folder."""

    def __init__(self, root, out):
        self.out = out
        if not (root / "pictures").exists():
            (root / "pictures").mkdir()
            for index, picture in enumerate(datasets.load("emoji").train.images[:40]):
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(root / f"pictures/{index}.png")
        self.options = ["--dataset", str(root / "pictures"), "--steps", "2", "--samples", "16", "--device", "cpu"]

    def __call__(self, *options):
        app(["demo", *self.options, "--out", str(self.out), *options])

    def made(self):
        facts = json.loads((self.out / "metrics.json").read_text())
        made = [*self.out.rglob("*")]
        names = sorted(str(p.relative_to(self.out)) for p in made)
        return {"rows": facts["rows"], "exact": exact(made), "names": names}


def go_on(run):
    """Go on with a run as its user would, and give what it made."""
    ended = child(run, "--resume")
    if ended.code == 2 and all(word in ended.said for word in ("nothing to resume", "Run without --resume")):
        ended = child(run)
    assert ended.code == 0 or "is finished" in ended.said, ended.said
    return run.made()


@pytest.fixture(scope="module")
def whole(root):
    """The changes of each command undisturbed, what it makes, and where."""
    done = {}

    def give(kind):
        if kind not in done:
            run = kind(root, root / f"whole-{kind.__name__}")
            done[kind] = count(run.out, run), run.made(), run.out
        return done[kind]

    return give


def killed_and_gone_on(root, whole, kind, points):
    changes, expected, _ = whole(kind)
    for number, (at, torn) in enumerate(points(changes)):
        run = kind(root, root / f"{kind.__name__}-{number}-{at}-{torn}")
        ended = killed(run.out, at, run, torn=torn)
        assert ended.code in (-signal.SIGKILL, -signal.SIGXFSZ) or (ended.code == 0 and torn), ended.said
        assert go_on(run) == expected, (at, torn, changes[at - 1])
        shutil.rmtree(run.out)


def two(changes):
    """Half a state, and half of the model."""
    states = [n for n, kind in enumerate(changes, 1) if kind == "safetensors"]
    return [(states[1], True), (states[-1], True)]


def every(changes):
    return [*((n, False) for n in range(1, len(changes) + 1)), *((n, True) for n in writes(changes))]


def files_done(changes):
    """When each file has got its name, and before each removal at the end."""
    renames = [n for n, kind in enumerate(changes, 1) if kind == "os.rename"]
    return {*(n + 1 for n in renames), *range(renames[-1] + 4, len(changes) + 1)}


def test_train_that_is_killed_during_a_write_goes_on_to_the_bit(root, whole):
    killed_and_gone_on(root, whole, Training, two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "moments"), [(Training, lambda changes: range(1, len(changes) + 1)), (Demonstration, files_done)]
)
def test_a_run_goes_on_to_the_bit_from_what_a_kill_at_any_change_leaves(root, whole, kind, moments):
    changes, expected, _ = whole(kind)
    (place := root / f"images-{kind.__name__}").mkdir()
    run = kind(root, root / f"imaged-{kind.__name__}")
    found = images(run.out, place, moments(changes), run)
    assert len(found) > len([*moments(changes)]) / 3
    for image in found:
        run = kind(root, image)
        assert go_on(run) == expected, image.name
        shutil.rmtree(run.out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Training, Demonstration])
def test_a_run_that_is_killed_at_random_moments_goes_on_to_the_bit(root, whole, kind):
    _, expected, _ = whole(kind)
    draw, start = random.Random(0), time.monotonic()
    child(kind(root, root / "timed"))
    lasts, reached = time.monotonic() - start, 0
    for number in range(KILLS):
        run = kind(root, root / f"random-{kind.__name__}-{number}")
        process, said = begin(run)
        time.sleep(draw.uniform(0, lasts))
        os.kill(process, signal.SIGKILL)
        reached += end(process, said).code == -signal.SIGKILL
        assert go_on(run) == expected, number
        shutil.rmtree(run.out)
    shutil.rmtree(root / "timed")
    assert reached > KILLS / 2


def test_train_on_a_full_disk_ends_in_a_sentence_and_goes_on_to_the_bit(root, whole):
    filled_and_gone_on(root, whole, lambda changes: [(1, False), *two(changes)[:1]])


@pytest.mark.slow
def test_train_on_a_disk_that_is_full_at_any_change_ends_in_a_sentence_and_goes_on_to_the_bit(root, whole):
    filled_and_gone_on(root, whole, every)


def filled_and_gone_on(root, whole, points):
    changes, expected, _ = whole(Training)
    failed = 0
    for at, torn in points(changes):
        run = Training(root, root / f"full-{at}-{torn}")
        ended = filled(run.out, at, run, torn=torn)
        if ended.code:
            failed += 1
            assert ended.code == 2, ended.said
            assert "Traceback" not in ended.said
            said = ended.said.splitlines()[-1]
            assert said.startswith("error: "), ended.said
            assert "Free some space" in said
            assert ("use --resume" in said) == (run.out / "config.json").exists()
        assert not [p for p in run.out.rglob("*") if p.suffix in (".tmp", ".old")]
        assert not [*run.out.parent.glob("*.lock"), *run.out.parent.glob(".*.lock")]
        assert go_on(run) == expected, (at, torn, changes[at - 1])
        shutil.rmtree(run.out)
    assert failed > len(points(changes)) / 2


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a disk")
def test_train_on_a_small_disk_ends_in_a_sentence_and_goes_on_to_the_bit_when_it_has_grown(root, whole, tmp_path):
    _, expected, _ = whole(Training)
    for size in (40, 150, 300, 450, 600):
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", tmp_path], capture_output=True)
        if made.returncode:
            pytest.skip("no disk can be mounted here")
        try:
            run = Training(root, root / f"small-{size}")
            run.out = tmp_path / "out"
            facts = json.loads(run.path.read_text())
            run.path.write_text(json.dumps(facts | {"out": str(run.out)}))
            ended = child(run)
            assert ended.code == 2, (size, ended.said)
            assert "Traceback" not in ended.said
            assert "No space left on device" in ended.said
            subprocess.run(["mount", "-o", "remount,size=8m", tmp_path], check=True)
            assert go_on(run) == expected, size
        finally:
            subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_during_the_write_of_a_state_stops_after_it(root, whole, number):
    changes, expected, _ = whole(Training)
    at = next(n for n, kind in enumerate(changes, 1) if kind == "safetensors")
    run = Training(root, root / f"signal-{number}")
    ended = signalled(run.out, at, number, 1, run)
    assert ended.code == 130, ended.said
    assert "Go on with the same command and --resume" in ended.said
    assert go_on(run) == expected


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_at_any_change_stops_and_goes_on_to_the_bit(root, whole, times):
    changes, expected, _ = whole(Training)
    for at in range(1, len(changes) + 1, 3 - times):  # the second one cuts a write short
        run = Training(root, root / f"signal-{times}-{at}")
        ended = signalled(run.out, at, signal.SIGTERM, times, run)
        assert ended.code in (0, 130), ended.said  # the last ones come when all is done
        assert "Traceback" not in ended.said
        assert go_on(run) == expected, (at, changes[at - 1])
        shutil.rmtree(run.out)


def test_a_state_that_is_missing_is_no_reason_to_start_again(root, whole):
    run = Training(root, root / "missing")
    shutil.copytree(whole(Training)[2], run.out)
    state = run.out / "state/latest.safetensors"
    kept = state.rename(root / "kept.safetensors")
    ended = child(run, "--resume")
    assert ended.code == 2
    assert "latest.safetensors' is missing or damaged. Put it back" in ended.said
    kept.rename(state)
    (run.out / "config.json").write_text("{")  # it is written anew; what counts is in the state
    assert go_on(run) == whole(Training)[1]


@pytest.mark.parametrize("lost", ["state/mse.safetensors", "state/samples-base.safetensors", "state/run.json"])
def test_a_missing_state_of_the_demo_is_named(tmp_path, lost):
    out = tmp_path / "out"
    key = {"seed": 3}
    mark = {"made by": demo.MADE_BY, "saved": ["mse", "samples-base", ["mse"], "../x", "x" * 300], **key}
    for name in ("mse", "samples-base"):
        files.save_state(out / f"state/{name}.safetensors", {}, {})
    files.write(out / "state/run.json", json.dumps(mark))
    demo._check(out, True, key)
    (out / lost).unlink()
    with pytest.raises(UserError, match=f"{Path(lost).name}' is missing or damaged"):
        demo._check(out, True, key)


# --- two runs in one folder ---------------------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused_until_the_first_ends_or_is_killed(root, whole):
    _, expected, _ = whole(Training)
    run = Training(root, root / "twice")
    process, said = begin(run)
    while not (run.out / "config.json").exists():
        assert os.waitpid(process, os.WNOHANG) == (0, 0), "it has ended"
        time.sleep(0.01)
    os.kill(process, signal.SIGSTOP)
    before = {p: p.read_bytes() for p in run.out.rglob("*") if p.is_file()}
    ended = child(run, "--resume")
    assert ended.code == 2
    assert "another run is at work in" in ended.said
    assert before == {p: p.read_bytes() for p in run.out.rglob("*") if p.is_file()}
    os.kill(process, signal.SIGKILL)
    end(process, said)
    assert (run.out.parent / ".twice.lock").exists()
    assert go_on(run) == expected
    assert not (run.out.parent / ".twice.lock").exists()


def test_a_lock_is_not_held_by_what_a_run_forks_and_is_gone_when_it_ends(tmp_path):
    folder = tmp_path / "runs/run"
    with held.hold(folder):
        assert "another run is at work" in child(try_hold, folder).said
        process, said = begin(time.sleep, 60)  # a process that reads pictures, and outlives the run by seconds
    assert [*tmp_path.iterdir()] == []
    assert child(try_hold, folder).code == 0
    os.kill(process, signal.SIGKILL)
    end(process, said)


def try_hold(folder, seconds=0):
    with held.hold(folder):
        print("held", flush=True)
        time.sleep(seconds)


def test_a_folder_stays_held_when_it_is_renamed_and_a_user_keeps_an_empty_one(tmp_path):
    (folder := tmp_path / "run").mkdir()
    with held.hold(folder):
        folder.rename(tmp_path / "run.1")
        assert "another run is at work" in child(try_hold, folder).said
    assert [path.name for path in tmp_path.iterdir()] == ["run.1"]


def test_a_lock_that_is_another_runs_is_not_removed(tmp_path):
    folder = tmp_path / "run"
    with held.hold(folder):
        for lock in tmp_path.rglob("*lock"):  # somebody tidied up
            lock.unlink()
        process, said = begin(try_hold, folder, 60)
        assert os.read(said, 4) == b"held"
    assert "another run is at work" in child(try_hold, folder).said
    os.kill(process, signal.SIGKILL)
    end(process, said)


def test_a_folder_is_looked_at_before_and_while_it_is_held(tmp_path):
    seen = []
    with held.hold(tmp_path / "run", lambda: seen.append([path.name for path in tmp_path.iterdir()])):
        assert seen == [[], [".run.lock"]]


def test_a_lock_beside_a_folder_is_never_a_link_or_a_pipe_that_is_followed(tmp_path):
    (tmp_path / ".run.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="cannot be used"), held.hold(tmp_path / "run"):
        pass
    assert not (tmp_path / "victim").exists()
    (tmp_path / ".run.lock").unlink()
    os.mkfifo(tmp_path / ".run.lock")
    assert child(try_hold, tmp_path / "run").code == 0


@pytest.mark.parametrize("command", [["sample"], ["evaluate", "data"]])
def test_pictures_are_not_sampled_into_a_folder_that_another_run_fills(root, tmp_path, command):
    options = {"sample": ["--out"], "evaluate": [str(root / "data"), "--samples"]}[command[0]]
    arguments = [command[0], str(root / "model"), *options, str(tmp_path / "out"), "--n", "8", "--steps", "1"]
    with held.hold(tmp_path / "out"):
        ended = child(app, arguments)
    assert ended.code == 2, ended.said
    assert "another run is at work in" in ended.said
    assert [*tmp_path.iterdir()] == []


# --- Checkpoints --------------------------------------------------------------------------------------------------------


def at_step(folder, step):
    return Run(folder).steps(0, step)


def killed_saves(tmp_path, points, again):
    """Kill a save of step 2, or of step 1 once more, with one of step 1 there."""
    states = {step: at_step(tmp_path / "none", step).weights() for step in (1, 2)}
    later = at_step(tmp_path / "run", 2)
    step = 1 if again else 2

    def prepare():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "first", tmp_path / "run")

    at_step(tmp_path / "first", 1).checkpoints.save(1)
    prepare()
    changes = count(tmp_path / "run", later.checkpoints.save, step)
    for at, torn in points(changes):
        prepare()
        ended = killed(tmp_path / "run", at, later.checkpoints.save, step, torn=torn)
        assert ended.code in (-signal.SIGKILL, -signal.SIGXFSZ) or torn, ended.said
        loaded = Run(tmp_path / "run")
        assert loaded.checkpoints.load() in ({1} if again else {1, 2})
        known = [all(torch.equal(*pair) for pair in zip(loaded.weights(), states[n], strict=True)) for n in (1, 2)]
        assert any(known), (at, torn, changes[at - 1])
        loaded.checkpoints.save(3)
        assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


def around_renames(changes):
    return [(n + after, False) for n, kind in enumerate(changes, 1) if kind == "os.rename" for after in (0, 1)]


@pytest.mark.parametrize("again", [False, True])
def test_a_checkpoint_whose_save_is_killed_around_a_rename_is_the_old_or_the_new_one(tmp_path, again):
    killed_saves(tmp_path, around_renames, again)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_a_checkpoint_whose_save_is_killed_at_any_change_is_the_old_or_the_new_one(tmp_path, again):
    killed_saves(tmp_path, every, again)


def test_a_checkpoint_on_a_full_disk_leaves_the_one_before_and_gives_the_space_back(tmp_path):
    run = Run(tmp_path / "run").steps(0, 1)
    run.checkpoints.save(1)
    changes = count(tmp_path / "run", run.checkpoints.save, 1)
    places = writes(changes)
    for at, torn in [(n, torn) for n in (places[0], places[-2], places[-1]) for torn in (False, True)]:
        ended = filled(tmp_path / "run", at, run.checkpoints.save, 2, torn=torn)
        assert ended.code == 70
        assert "OSError: " in ended.said.splitlines()[-1], ended.said
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["step-00000001"]
    assert run.checkpoints.load() == 1


def test_a_checkpoint_with_a_flipped_bit_in_any_file_is_refused_before_anything_is_loaded(tmp_path):
    run, draw = Run(tmp_path, about="this run").steps(0, 1), random.Random(0)
    place = run.checkpoints.save(1)
    before = run.steps(1, 2).weights()
    for path in sorted(p for p in place.rglob("*") if p.is_file()):
        good = path.read_bytes()
        for _ in range(20):
            bad = bytearray(good)
            bad[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(ValueError, match="the checkpoint"):
                run.checkpoints.load()
        path.write_bytes(good)
    assert all(torch.equal(*pair) for pair in zip(before, run.weights(), strict=True))
    assert run.checkpoints.load() == 1


def test_a_checkpoint_with_files_of_another_run_or_a_file_in_its_place_is_refused(tmp_path):
    run = Run(tmp_path / "a").steps(0, 1)
    place = run.checkpoints.save(1)
    other = Run(tmp_path / "b", seed=5).steps(0, 1).checkpoints.save(1)
    shutil.copy(other / "optimizer.bin", place)
    with pytest.raises(ValueError, match=r"optimizer.bin are missing, cut short or changed"):
        run.checkpoints.load()
    shutil.rmtree(place)
    place.write_text("")
    with pytest.raises(ValueError, match="cannot be read"):
        run.checkpoints.load()
    shutil.copytree(other, tmp_path / "a/step-00000007")
    with pytest.raises(ValueError, match="says that it is of step 1"):
        run.checkpoints.load()


def test_a_checkpoint_of_version_0_1_with_sizes_alone_is_still_read(tmp_path):
    run = Run(tmp_path).steps(0, 1)
    about = run.checkpoints.save(1) / "checkpoint.json"
    facts = json.loads(about.read_text())
    facts["files"] = {name: (about.parent / name).stat().st_size for name in facts["files"]}
    about.write_text(json.dumps(facts))
    assert run.checkpoints.load() == 1


# --- examples -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_claimed_for_what_its_run_is_of(tmp_path):
    files.claim(tmp_path, "model 'a', seed 0")
    files.claim(tmp_path, "model 'a', seed 0")
    with pytest.raises(UserError, match="is of model 'a', seed 0, and this run of model 'b', seed 0"):
        files.claim(tmp_path, "model 'b', seed 0")
    assert (tmp_path / "run.txt").read_text() == "model 'a', seed 0\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", test_examples.NEEDS)
def test_other_data_is_refused_between_the_end_of_an_examples_base_and_its_next_checkpoint(name, tmp_path, capsys):
    clip, left = Accelerator.clip_grad_norm_, iter(range(4))  # the base has four steps

    def stop(self, *arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return clip(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "clip_grad_norm_", stop)
        with pytest.raises(KeyboardInterrupt):
            test_examples.run(name, tmp_path / "out")
    assert (tmp_path / "out/base").exists()
    assert not any((tmp_path / "out/state").glob("model/step-*"))
    for option, value in (("--model", "other"), ("--seed", "5")):
        said = test_examples.refused(capsys, name, tmp_path / "out", "--resume", option, value)
        assert re.search(rf"the run in .* is of .* and this run of .*{option[2:]} '?{value}", said), said
    test_examples.run(name, tmp_path / "out", "--resume")
