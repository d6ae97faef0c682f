"""`perceptual-diffusion doctor` sees wrong numbers, survives damaged packages, needs torch alone, and tells no secrets."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perceptual_diffusion import objective, taps
from perceptual_diffusion.cli import doctor, environment, selftest
from perceptual_diffusion.cli.selftest import Case, UNet

ROOT = Path(doctor.__file__).parents[2]

# --- the self-test ----------------------------------------------------------------------------------------------------


def damaging(change):
    """Puts a fault into what the prediction is off by."""
    return lambda patch: patch.setattr(objective, "prediction_error", lambda *args: change(PREDICTION_ERROR(*args)))


def shared(patch):
    wrap = Case._wrap

    def sharing(self, model):
        made = wrap(self, model)
        made.teacher.module.first.weight = model.first.weight
        return made

    patch.setattr(Case, "_wrap", sharing)


def to_the_end(patch):
    patch.setattr(taps, "may_stop", lambda model, layers: False)
    wrap = selftest.SelfPerceptualObjective.wrap
    patch.setattr(selftest.SelfPerceptualObjective, "wrap", lambda *args, **rest: wrap(*args, truncate=False, **rest))


PREDICTION_ERROR = objective.prediction_error
half = damaging(lambda error: error / 2)
steeper = damaging(lambda error: error + (error - error.detach()) / 2)
infinite = damaging(lambda error: error * float("nan"))
CHANCE = torch.Generator()
shaky = damaging(lambda error: error + 1e-6 * torch.randn((), generator=CHANCE))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (half, "the loss is off by"),
        (steeper, "the gradient is off by"),
        (shared, "the teacher's weights changed with the student's"),
        (to_the_end, "the teacher's pass did not end at its last layer"),
        (shaky, "two runs from one seed differ"),
        (infinite, "nan|not finite|NaN"),
    ],
)
def test_the_self_test_sees_what_is_wrong(damage, said, monkeypatch):
    damage(monkeypatch)
    result = Case(make=UNet, device="cpu").run()
    assert any(re.search(said, problem) for problem in result.problems), result
    json.dumps(dataclasses.asdict(result), allow_nan=False)
    if damage is steeper:
        assert result.loss_error < 1e-6, "only the gradient is wrong"


@pytest.mark.skipif(torch.xpu.is_available(), reason="this device is not there elsewhere")
def test_a_dtype_that_torch_cannot_train_in_is_a_note_but_float32_must_work():
    half, full = (Case(make=UNet, device="xpu", dtype=dtype).run() for dtype in ("float16", "float32"))
    assert (half.problems, half.loss_error) == ([], None)
    assert half.note.startswith("torch itself cannot train so: ")
    assert full.problems == [half.note]


def test_a_compiler_that_fails_or_is_off_is_a_note():
    with torch._dynamo.config.patch(disable=True):  # set and deleted, as by monkeypatch, it would not exist afterwards
        (result,) = selftest.compiled("cpu")
    assert (result.problems, result.note) == ([], "torch.compile is switched off here")


def test_a_damaged_peft_is_a_note(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    (result,) = selftest.lora("cpu")
    assert (result.problems, result.loss_error) == ([], None)
    assert result.note.startswith("peft cannot be imported: ")


# --- packages ---------------------------------------------------------------------------------------------------------


def test_the_versions_asked_for_are_those_of_the_package():
    wanted = environment.requirements()
    assert set(doctor.PARTS) < set(wanted)
    assert wanted[""]["torch"] == ">=2.6"
    assert wanted["train"]["diffusers"] == wanted["diffusers"]["diffusers"], "an extra holds those it names"
    assert "!=2.6.2" in wanted["dev"]["lightning"]
    assert wanted["examples"].items() > wanted["demo"].items()


def test_without_a_clone_the_installed_metadata_say_the_same(tmp_path, monkeypatch):
    (tmp_path / "perceptual_diffusion-1.0.dist-info").mkdir()
    (tmp_path / "perceptual_diffusion-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: perceptual-diffusion\nVersion: 1.0\nRequires-Dist: torch>=2.6\nProvides-Extra: a\n"
        "Requires-Dist: Pillow<13,>=10.1; extra == 'a'\nRequires-Dist: x[y]; (python_version > '3') and extra == 'b'\n"
        'Requires-Dist: perceptual-diffusion[a]; extra == "b"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert requires("perceptual-diffusion")[0] == "torch>=2.6"
    assert environment.requirements() == {
        "": {"torch": ">=2.6"}, "a": {"pillow": "<13,>=10.1"}, "b": {"x": "", "pillow": "<13,>=10.1"},
    }  # fmt: skip
    assert environment.pip("a") == "pip install 'perceptual-diffusion[a]'"


@pytest.mark.parametrize(
    ("package", "version", "wanted", "said"),
    [
        ("diffusers", "0.34.0", ">=0.35", "0.34.0 is installed, expected >=0.35"),
        ("diffusers", "0.35.0", ">=0.35", ""),
        ("diffusers", "0.100", ">=0.35", ""),
        ("torch", "2.14.1+cpu", ">=2.6", ""),
        ("lightning", "2.6.2", "", "2.6.2 is a malicious release"),
        ("lightning", "2.6.4", ">=2.5,!=2.6.2,!=2.6.3", ""),
        ("lightning", "2.6.5", ">=2.5,!=2.6.5", "2.6.5 is installed, expected >=2.5,!=2.6.5"),
        ("pillow", "13.0", "<13,>=10.1", "13.0 is installed, expected <13,>=10.1"),
        ("x", "no version", ">=1", ""),
        ("x", "", ">=1", ""),
    ],
)
def test_versions_are_held_against_what_is_asked_for(package, version, wanted, said):
    assert environment.misfit(package, version, wanted) == said


def place(folder, name, version, code="", **modules):
    """A package with its metadata."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


def test_damaged_packages_are_named_and_the_others_still_looked_at(tmp_path, monkeypatch):
    place(tmp_path, "einops", "0.9", "import warnings, sys\nwarnings.warn('old')\nprint('half a line', end='')\n")
    place(tmp_path, "peft", "0.20", "raise RuntimeError('operator nms does not exist')")
    place(tmp_path, "accelerate", "1.2", "import os\nos.abort()")
    place(tmp_path, "timm", "1.0", "import sys\nsys.exit('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    found = doctor._imports(["einops", "accelerate", "peft", "timm"])
    assert found["einops"] == ""
    assert found["peft"] == "cannot be imported: RuntimeError: operator nms does not exist"
    assert found["timm"] == "cannot be imported: SystemExit: no licence"
    assert found["accelerate"].startswith("cannot be imported: its process ended with ")


def test_a_malicious_release_is_named_and_never_imported(tmp_path, monkeypatch):
    place(tmp_path, "lightning", "2.6.3", f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    packages = doctor._packages(environment.requirements())
    assert packages["lightning"]["problem"] == "2.6.3 is a malicious release"
    assert "torch" in doctor._importable(packages)
    assert "lightning" not in doctor._importable(packages)
    assert not (tmp_path / "ran").exists()


def test_a_part_says_what_is_missing_old_or_broken_and_what_mends_it():
    wanted = {"train": {"peft": ">=0.17", "tqdm": "", "diffusers": ">=0.35", "typer": ""}, "demo": {"typer": ""}}
    packages = {
        "peft": {"version": "0.16", "problem": "0.16 is installed, expected >=0.17"},
        "tqdm": {"version": "", "problem": ""},
        "diffusers": {"version": "0.42", "problem": "cannot be imported: RuntimeError"},
        "typer": {"version": "0.21", "problem": ""},
    }
    parts = doctor._parts(wanted, packages)
    assert doctor._state(parts["train"]) == "missing: tqdm; old: peft; broken: diffusers"
    assert parts["train"]["mend"] == "pip install -e '.[train]' && pip install --force-reinstall diffusers"
    assert doctor._state(parts["demo"]) == "works"
    assert doctor._state(parts["timm"]) == "unknown", "no metadata say what it needs"


def test_every_module_that_stands_for_a_package_is_one_that_an_extra_names():
    wanted = environment.requirements()
    assert set(selftest.MODULES) <= set().union(*(wanted[extra] for extra in doctor.PARTS))


# --- what is told, and what is not ------------------------------------------------------------------------------------


def test_only_listed_variables_are_told(monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OMP_SECRET", "TORCH_TOKEN", "HF_ENDPOINT"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("OMP_WAIT_POLICY", "a\nb\x1b[31m|")
    found = environment.redact(environment.machine())
    assert "hunter2" not in json.dumps(found)
    assert found["variables"]["OMP_WAIT_POLICY"] == "a\\nb\\x1b[31m|"
    assert not [name for name in environment.SHOWN if re.search("TOKEN|KEY|SECRET|PASS|ENDPOINT|PROXY", name)]


NAMES = st.from_regex(r"[a-z][a-z0-9_]{3,11}", fullmatch=True).filter(lambda name: name not in ("home", "users"))


@settings(max_examples=15)
@given(NAMES, st.sampled_from(["/home/{}", "/Users/{}", "/data/people/{}", "C:\\Users\\{}"]))
def test_neither_the_home_folder_nor_the_user_is_told(user, home):
    home = home.format(user)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "USERPROFILE"):
            patch.setenv(name, home)
        for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            patch.setenv(name, user)
        told = environment.redact(
            {
                "a": [f"cannot open {home}/x/lib.so", f"/tmp/torchinductor_{user}:{home}"],
                "b": f"{home}",
                "c": 1.5,
                "d": None,
            }
        )
    assert user not in re.sub(r"/x/lib.so|cannot open|tmp/torchinductor", "", json.dumps(told))
    assert told["b"] == "~"
    assert told["a"][0] == "cannot open ~/x/lib.so"
    assert (told["c"], told["d"]) == (1.5, None)


def test_a_folder_that_begins_like_the_home_folder_is_left_as_it_is(monkeypatch):
    monkeypatch.setenv("HOME", "/root")
    assert environment.redact("/rootfs/lib /root/lib /root") == "/rootfs/lib ~/lib ~"


FOUND = {
    "machine": {"perceptual-diffusion": "0.1.0", "variables": {"OMP_NUM_THREADS": "1|2"}},
    "devices": [{"device": "cpu", "is": "a CPU", "memory": "1.0 GiB"}],
    "packages": {"peft": {"version": "", "wanted": ">=0.17", "problem": ""}},
    "parts": {"timm": {"for": "x", "works": True, "missing": [], "old": [], "broken": [], "mend": ""}},
    "tests": [
        dataclasses.asdict(selftest.Result(device="cpu", dtype="float32", case="UNet", loss_error=1e-7, gradient_error=2e-7, bound=1e-4)),
        dataclasses.asdict(selftest.Result(device="cpu", dtype="float16", case="DiT", problems=["the loss is off by 2"])),
        dataclasses.asdict(selftest.Result(device="cpu", dtype="float32", case="DiT, LoRA", note="there is no peft that fits")),
    ],
    "notes": ["something"], "passed": False,
}  # fmt: skip


def test_markdown_is_tables_with_one_line_for_a_row_and_a_verdict():
    text = doctor.markdown(FOUND)
    for rows in re.findall(r"(?:^\|.*\n)+", text, re.M):
        columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows.splitlines()}
        assert len(columns) == 1, rows
    assert "| cpu | float16 | DiT | - | - | - | FAILED: the loss is off by 2 |" in text
    assert "| not tested: there is no peft that fits |" in text
    assert r"OMP_NUM_THREADS=1\|2" in text
    assert text.splitlines()[-2] == "- something"
    assert text.splitlines()[-1].startswith(
        "- 1 of 2 self-tests failed (cpu, float16, DiT). Do not train so on this machine"
    )


def test_the_terminal_gets_the_same_words(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "300")
    assert doctor._on_terminal(FOUND)
    text = capsys.readouterr().out
    for _, head, rows in doctor.tables(FOUND):
        for cell in (*head, *(cell for row in rows for cell in row)):
            assert cell in text, cell


def test_without_rich_a_terminal_gets_markdown(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert not doctor._on_terminal(FOUND)


# --- the command ------------------------------------------------------------------------------------------------------

CORE = (
    "torch", "torchgen", "functorch", "typing_extensions.py", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock",
    "fsspec", "setuptools", "pkg_resources", "_distutils_hack", "nvidia", "triton", "cuda", "numpy", "numpy.libs",
)  # fmt: skip
"""What torch needs: numpy as well, or it warns."""


@pytest.fixture
def core_alone(tmp_path):
    """An environment in which there is torch and the package, and no other."""
    site = Path(torch.__file__).parents[1]
    (tmp_path / "core").mkdir()
    for name in CORE:
        if (site / name).exists():
            (tmp_path / "core" / name).symlink_to(site / name)
    (tmp_path / "core" / "perceptual_diffusion").symlink_to(ROOT / "perceptual_diffusion")
    variables = {"PYTHONPATH": str(tmp_path / "core"), "TORCH_COMPILE_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}

    def start(*arguments, **more):
        return subprocess.run(
            [sys.executable, "-S", "-W", "error", *arguments], env=os.environ | variables | more, cwd=tmp_path,
            capture_output=True, text=True, check=False, timeout=500,
        )  # fmt: skip

    return start


def test_torch_alone_is_enough(core_alone):
    assert core_alone("-c", "import typer").returncode == 1
    done = core_alone("-m", "perceptual_diffusion.cli.doctor", "--json", HF_TOKEN="hunter2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["passed"]
    ran, both = [test for test in found["tests"] if test["loss_error"] is not None], ("UNet", "DiT")
    assert [(test["dtype"], test["case"]) for test in ran] == [
        *((dtype, name) for dtype in selftest.DTYPES for name in both),
        *(("float32", f"{name}, {how}") for name in both for how in ("checkpointing", "bf16 autocast")),
    ]
    assert all(0 < max(test["loss_error"], test["gradient_error"]) < test["bound"] / 2 for test in ran), ran
    assert {test["case"]: test["note"] for test in found["tests"] if test["note"]} == {
        "DiT, compiled": "torch.compile is switched off here", "DiT, LoRA": "there is no peft that fits",
    }  # fmt: skip
    assert not any(part["works"] for part in found["parts"].values())
    assert all("[" in part["mend"] for part in found["parts"].values())
    assert "hunter2" not in done.stdout
    assert str(Path.home()) not in done.stdout


def test_the_command_itself_needs_torch_alone(core_alone):
    done = core_alone("-m", "perceptual_diffusion", "doctor", "--help")
    assert (done.returncode, "--report" in done.stdout) == (0, True), done.stderr


def test_both_ways_in_have_the_same_options(capsys):
    typer = pytest.importorskip("typer")
    from perceptual_diffusion.cli._app import app

    command = typer.main.get_command(app).commands["doctor"]
    with pytest.raises(SystemExit):
        doctor.main(["--help"])
    printed = set(re.findall(r"--[a-z]+", capsys.readouterr().out))
    assert printed == {name for parameter in command.params for name in parameter.opts} | {"--help"}
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--nonsense"])
    assert ended.value.code == 2


@pytest.mark.slow
def test_a_wrong_number_ends_with_exit_code_1_and_says_which(core_alone, tmp_path):
    (tmp_path / "core" / "broken.py").write_text(
        "from perceptual_diffusion import objective\nright = objective.renoise\n"
        "objective.renoise = lambda x, e, **rest: right(x, e / 2, **rest)\n"
    )
    code = "import sys; from perceptual_diffusion.cli import doctor; doctor.CHILD = doctor.CHILD.replace('from p', 'import broken; from p'); doctor.main()"
    done = core_alone("-c", code)
    assert done.returncode == 1, done.stderr
    assert "12 of 12 self-tests failed" in done.stdout
    assert "FAILED: the loss is off by" in done.stdout


@pytest.mark.slow
def test_the_whole_of_it_in_this_environment(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "perceptual_diffusion", "doctor", "--json"], cwd=tmp_path, capture_output=True, text=True,
        check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not list(tmp_path.iterdir()), "it writes nothing"
    assert all(part["works"] for part in found["parts"].values()), found["parts"]
    right = {test["case"] for test in found["tests"] if test["loss_error"] is not None}
    assert "DiT, LoRA" in right
    assert found["passed"]
    (compiled,) = (test for test in found["tests"] if test["case"] == "DiT, compiled")
    assert compiled["loss_error"] is not None or compiled["note"]
