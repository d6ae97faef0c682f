"""The config file of `train`: what it may hold, and what is said of what it may not."""

import inspect
import json
from pathlib import Path

import pytest

from perceptual_diffusion import SelfPerceptualObjective
from perceptual_diffusion.cli import config
from perceptual_diffusion.cli._errors import UserError

TOP = 'model = "m"\ndata = "d"\nout = "o"\n'


def toml(tmp_path, text, name="run.toml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_defaults_are_those_of_wrap(tmp_path):
    read = config.load(toml(tmp_path, TOP))
    own = inspect.signature(SelfPerceptualObjective.__init__).parameters  # `wrap` leaves t' to the teacher
    for name in ("distance", "mse_weight", "t_prime", "formulation", "micro_batch"):
        assert getattr(read.objective, name) == own[name].default
    assert read.training == config.Training()
    assert read.objective == config.Objective()


def test_paths_are_relative_to_the_file_and_a_hub_id_stays(tmp_path):
    read = config.load(toml(tmp_path, TOP.replace('"m"', '"owner/model"').replace('"d"', '"../pictures"')))
    assert read.model == "owner/model"
    assert Path(read.data) == tmp_path / "../pictures"
    assert Path(read.out) == tmp_path / "o"
    (tmp_path / "owner/model").mkdir(parents=True)
    assert config.load(tmp_path / "run.toml").model == str(tmp_path / "owner/model")


def test_json_and_toml_say_the_same(tmp_path):
    text = (
        TOP
        + '[training]\nsteps = 7\nlr = 1\n[objective]\nlayers = ["mid_block"]\nt_range = [100, 900]\nmicro_batch = 2\n'
    )
    given = {
        "model": "m", "data": "d", "out": "o", "training": {"steps": 7, "lr": 1},
        "objective": {"layers": ["mid_block"], "t_range": [100, 900], "micro_batch": 2},
    }  # fmt: skip
    read = config.load(toml(tmp_path, text))
    assert read == config.load(toml(tmp_path, json.dumps(given), "run.json"))
    assert read.objective.t_range == (100.0, 900.0)
    assert isinstance(read.training.lr, float)


WRONG = {
    TOP + '[training]\nsteps = 3\nlearning_rat = 1\n': r"run.toml:6: \[training\] unknown key 'learning_rat'",
    TOP + "[training]\nstep = 3\n": r"unknown key 'step'. Did you mean 'steps'\?",
    TOP + "[trainin]\nsteps = 3\n": r"run.toml:4: unknown key 'trainin'. Did you mean 'training'\?",
    TOP + "[objective]\nlora_rank = 3\n": r"unknown key 'lora_rank'. It belongs into \[training\]",
    TOP + "zzzz = 3\n": r"unknown key 'zzzz'. The keys are model, data, out, training, objective",
    'model = "m"\nout = "o"\n': r"`data` is missing: folder of pictures",
    TOP + "training = 3\n": r"run.toml:4: \[training\] this is 3, expected a section",
    TOP + "[training]\nsteps = 0\n": r"run.toml:5: \[training\] `steps` is 0, expected a whole number from 1 to",
    TOP + "[training]\nsteps = 2.5\n": r"`steps` is 2.5, expected a whole number",
    TOP + "[training]\nsteps = true\n": r"`steps` is True, expected a whole number",
    TOP + '[training]\nsteps = "3"\n': r"`steps` is '3', expected a whole number",
    TOP + "[training]\nlr = nan\n": r"`lr` is nan, expected a number from 0 to 1",
    TOP + "[training]\nlr = inf\n": r"`lr` is inf",
    TOP + "[training]\nema = 1.0\n": r"`ema` is 1.0, expected a number from 0 to 0.999999",
    TOP + '[training]\nprecision = "bf"\n': r"`precision` is 'bf', expected one of 'no', 'bf16', 'fp16'; did you mean 'bf16'\?",
    TOP + "[training]\ngradient_checkpointing = 1\n": r"is 1, expected true or false",
    TOP + '[objective]\nlayers = "mid"\n': r"`layers` is 'mid', expected a list of names",
    TOP + "[objective]\nlayers = [3]\n": r"`layers` is 3, expected a name",
    TOP + "[objective]\nt_range = [1]\n": r"`t_range` is \[1\], expected \[low, high\]",
    TOP + '[objective]\nmicro_batch = "al"\n': r"`micro_batch` is 'al', expected one of 'auto', 'none'",
    TOP + "[objective]\nmicro_batch = 0\n": r"`micro_batch` is 0, expected a whole number from 1 to \d+ or 'auto' or 'none'",
    TOP + '[objective]\nteacher = "lora"\n': r"run.toml:5: \[objective\] `teacher` is 'lora', but `lora_rank` is 0",
    'model = ""\ndata = "d"\nout = "o"\n': r"run.toml:1: `model` is '', expected a name",
    "model = 3\n": r"`model` is 3, expected a name in quotes",
    TOP + "out = 'p'\n": r"cannot be read as TOML: .*line 4",
    "model = \n": r"cannot be read as TOML: .*line 1",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named_with_its_place(tmp_path, text):
    with pytest.raises(UserError, match=WRONG[text]):
        config.load(toml(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": "m", "model": "n"}', "the key 'model' is there twice"),
        ('{"model": "m", "training": {"lr": NaN}}', "NaN is no number of JSON"),
        ('{"model": "m", "training": {"lr": 1e999}}', r"run.json:1: \[training\] `lr` is inf"),
        ("[]", r"run.json: this is \[\], expected a section of keys"),
        ("{", "run.json: this cannot be read as JSON"),
        ("[" * 100_000, "this cannot be read as JSON"),
        ('{"model": null}', "`model` is None"),
    ],
)
def test_json_is_as_strict(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        config.load(toml(tmp_path, text, "run.json"))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path, message in [
        (tmp_path / "none.toml", "which cannot be read: No such file"),
        (tmp_path, "which cannot be read: Is a directory"),
        (toml(tmp_path, TOP, "run.yaml"), "expected a file that ends in .toml or .json"),
    ]:
        with pytest.raises(UserError, match=message):
            config.load(path)
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="it is not UTF-8"):
        config.load(tmp_path / "b.toml")


def test_the_documented_tables_are_those_of_the_code():
    page = (Path(__file__).parents[1] / "docs/cli.md").read_text("utf-8")
    for section in (config.Config, config.Training, config.Objective):
        for row in config.table(section):
            assert "| " + " | ".join(f"`{c}`" if i in (0, 2) and c else c for i, c in enumerate(row)) + " |" in page
