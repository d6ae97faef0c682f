"""What SECURITY.md promises, promise by promise: the hostile file that would break it, and the command that gets it."""

import json
import os
import shutil

import pipelines
import pytest
import watched
from PIL import Image
from safetensors.torch import save_file
from test_fuzz_cli import EPS, PLANTS, Case, claimed, header, png, row, stock, tensors
from test_fuzz_cli import config as config_of

from perceptual_diffusion.cli import _paths, _pictures, config, files, folders, loading, plan, report
from perceptual_diffusion.cli._errors import UserError, plain

SAMPLE = ("sample", "model", "--out", "out", "--n", "1", "--steps", "1")


@pytest.fixture
def case(tmp_path):
    """A folder with a tiny model, pictures and a config, and what nobody may touch."""
    made = Case(tmp_path)
    made.take("data")
    made.take("model")
    (tmp_path / "given/run.json").write_text(json.dumps(config_of()))
    return made


def refused(case, *arguments, **more):
    done = case.judge(arguments, **more)
    assert done["code"] == 2, done
    return next(line for line in done["err"].splitlines() if line.startswith("error: "))


# --- the watch itself -------------------------------------------------------------------------------------------------

HOSTILE = """
import os, pickle, socket, subprocess

def build():
    open("../victim/x", "w").close()
    os.mkdir("../victim/folder")
    os.symlink("x", "../victim/link")
    os.rename("../victim/x", "../victim/y")
    os.remove("../victim/y")
    exec("1 + 1")
    pickle.loads(b"cos\\nsystem\\n.")
    subprocess.run(["true"])
    socket.socket().close()
"""


def test_the_watch_sees_what_hostile_code_does(case):
    """`inspect module:callable` runs the user's own code, by design; here it is hostile."""
    case.put("hostile_module.py", HOSTILE.encode())
    done = watched.run(["inspect", "hostile_module:build"], case.root / "given", case.outputs())
    found = {line.split(":")[0] for line in done["found"]}
    assert any(line.startswith("exec: ") and "hostile_module.py" in line for line in done["found"])
    assert {"open", "os.mkdir", "os.symlink", "os.rename", "os.remove", "exec", "compile", "pickle.find_class"} <= found
    assert {"subprocess.Popen", "socket.__new__", "hostile_module"} <= found
    assert (case.root / "victim/folder").is_dir()


def test_a_plain_run_does_nothing_that_the_watch_would_note_and_works(case):
    assert case.judge(SAMPLE)["code"] == 0
    assert (case.out / "0.png").is_file()


@pytest.mark.slow
def test_with_folders_no_command_opens_a_socket_also_where_it_may(case):
    """Without HF_HUB_OFFLINE: what is on disk needs no network."""
    case.link("text", stock() / "text")
    (case.root / "given/text.json").write_text(json.dumps(config_of(model="text")))
    for arguments in [
        SAMPLE, ("inspect", "model"), ("inspect", "text", "--json"), ("evaluate", "data", "data"), ("train", "text.json"),
        ("sample", "text", "--prompt", "a", "--n", "1", "--steps", "1", "--out", "out/more"),
    ]:  # fmt: skip
        assert case.judge(arguments, offline=False)["code"] == 0


# --- nothing is run that a file names or holds ------------------------------------------------------------------------

EVIL = b"cos\nsystem\n(S'touch ../victim/x'\ntR."


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_pickled_weights_are_never_read(case, name):
    (case.root / "given/model/unet/diffusion_pytorch_model.safetensors").unlink()
    case.put(f"model/unet/{name}", EVIL)
    assert "cannot be loaded" in refused(case, *SAMPLE)


def test_a_pickled_lora_is_never_read(case):
    case.link("text", stock() / "text")
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"):
        case.put(f"lora/{name}", EVIL)
    arguments = ("sample", "text", "--prompt", "a", "--out", "out", "--n", "1", "--steps", "1", "--lora", "lora")
    assert "--lora 'lora' cannot be loaded" in refused(case, *arguments)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("model_index.json", "_class_name", ["hostile_module", "Hostile"]),
        ("model_index.json", "_class_name", "Hostile"),
        ("model_index.json", "unet", ["hostile_module", "UNet2DModel"]),
        ("model_index.json", "unet", ["diffusers", "../hostile_module.UNet2DModel"]),
        ("model_index.json", "scheduler", ["os", "system"]),
        ("unet/config.json", "_class_name", "hostile_module.Hostile"),
    ],
)
def test_a_class_that_a_file_names_is_looked_up_and_never_imported(case, file, key, value):
    for place in ("", "model/", "model/unet/"):
        case.put(f"{place}hostile_module.py", b"open('../victim/x', 'w')")
    path = case.root / "given/model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    arguments = ("inspect", "model") if file == "unet/config.json" else SAMPLE
    told = "names the pipeline" if (file, key) == ("model_index.json", "_class_name") else "not among the known"
    assert told in refused(case, *arguments)


def test_no_picture_is_handed_to_another_program(case):
    """PostScript that is called a picture: Pillow goes by the content, and would start Ghostscript."""
    case.put("data/evil.png", EPS)
    done = case.judge(["evaluate", "data", "data"])
    assert "evil.png: cannot identify" in done["out"]
    assert "1 files of A cannot be read" in done["out"]
    assert "nothing to resume" in refused(case, "demo", "--resume", "--dataset", "data", "--out", "out")


def test_training_hands_no_picture_to_another_program(case):
    case.put("data/evil.png", EPS)
    case.judge(["train", "run.json", "--dry-run"])


# --- nothing is written elsewhere, and nothing is read from elsewhere ---------------------------------------------------


@pytest.mark.parametrize("name", PLANTS)
@pytest.mark.parametrize("command", [("train", "run.json", "--resume"), ("demo", "--out", "out", "--resume")])
def test_a_link_in_an_output_folder_is_refused(case, command, name):
    case.link(f"out/{name}", case.root / "victim")
    assert "Remove the link" in refused(case, *command)


def test_sample_replaces_links_and_never_writes_through_them(case):
    case.judge(SAMPLE)
    record = (case.out / "samples.json").read_bytes()
    (case.out / "0.png").unlink()
    case.link("out/0.png", case.root / "victim/secret.txt")
    assert case.judge([*SAMPLE, "--overwrite"])["code"] == 0
    assert not (case.out / "0.png").is_symlink()
    assert (case.out / "samples.json").read_bytes() == record


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("../victim/secret.txt", "outside of its folder"), ("/etc/hostname", "outside of its folder"), ("link.png", "outside of its folder"),
        ("a\0b", "cannot be used"), ("x" * 300, "cannot be used"), ("..", "no regular file"),
    ],
)  # fmt: skip
def test_a_record_of_samples_names_files_of_its_folder_only(case, name, told):
    case.link("data/link.png", "../victim/secret.txt")
    case.put("data/samples.json", json.dumps({"pictures": [{"file": name}]}).encode())
    assert told in refused(case, "evaluate", "data", "data")


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "data", "data"),
        ("demo", "--dataset", "data", "--resume", "--out", "out"),
        ("train", "run.json", "--dry-run"),
    ],
)
def test_pictures_are_not_read_through_links_out_of_the_folder(case, command):
    Image.new("RGB", (9, 9)).save(case.root / "victim/secret.png")
    case.link("data/x.png", "../../victim/secret.png")
    assert "is a link out of the folder" in refused(case, *command)


# --- sizes ------------------------------------------------------------------------------------------------------------

LYING = {
    "the header is longer than the file": header(b"{}", 2**63),
    "the header has 100 MB": header(b"{}", 10**8 - 1),
    "two tensors overlap": tensors(a=row(), b=row(at=(8, 24))),
    "2**60 elements": tensors(a=row(shape=(2**60,), at=(0, 64))),
    "the dtype does not fit the bytes": tensors(a=row("I64")),
    "an unknown dtype": tensors(a=row("Q9")),
    "a hole": tensors(a=row(at=(48, 64))),
    "another shape": tensors(**{"conv_in.bias": row("F32", (16,), (0, 64))}),
}


@pytest.mark.parametrize("name", LYING)
def test_a_header_of_safetensors_that_lies_is_refused(case, name):
    case.put("model/unet/diffusion_pytorch_model.safetensors", LYING[name])
    assert "cannot be loaded" in refused(case, *SAMPLE)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("unet/config.json", "layers_per_block", 2**31),
        ("unet/config.json", "block_out_channels", [2**40, 8]),
        ("unet/config.json", "block_out_channels", [8] * 10**5),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 2**62),
    ],
)
def test_a_config_of_a_gigantic_model_is_refused_before_it_is_made(case, file, key, value):
    path = case.root / "given/model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    for arguments in (SAMPLE, ("inspect", "model"), ("train", "run.json", "--dry-run")):
        assert f"`{key}` in" in refused(case, *arguments)


def test_configs_of_released_models_are_within_the_sizes(tmp_path):
    for kind in ("sd", "dit", "sdxl", "flux"):
        folder = pipelines.write(kind, tmp_path / kind)
        for path in folder.glob("*/*config.json"):
            if "tokenizer" not in path.name:
                loading.check_sizes(json.loads(path.read_text()), path)
    loading.check_sizes(
        {"vocab_size": 256_384, "num_layers": 128, "rope_theta": 1e6, "sample_size": [1024, 1024]}, tmp_path
    )


def test_a_picture_that_claims_to_be_huge_is_not_decoded(tmp_path):
    for size in ((2**31 - 1, 2**31 - 1), (30_000, 30_000), (9460, 9460)):
        (tmp_path / "x.png").write_bytes(claimed(*size))
        with pytest.raises(OSError, match=r"pixels|decompression bomb"):
            _pictures.open_picture(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(png())
    assert _pictures.open_picture(tmp_path / "x.png").size == (8, 8)


PIPES = {
    "out/config.json": ("train", "more.json", "--resume"),
    "out/log.jsonl": ("train", "more.json", "--resume"),
    "out/state/latest.safetensors": ("train", "more.json", "--resume"),
    "out/metrics.json": ("demo", "--out", "out", "--resume"),
    "out/state/run.json": ("demo", "--out", "out", "--resume"),
    "out/samples.json": ("sample", "model", "--out", "out", "--overwrite"),
    "data/metadata.jsonl": ("train", "text.json", "--dry-run"),
}


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_in_a_shared_folder_is_not_waited_for(case, name):
    if "more.json" in PIPES[name]:
        case.go_on()
    case.link("text", stock() / "text")
    (case.root / "given/text.json").write_text(json.dumps(config_of(model="text")))
    path = case.root / "given" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    done = case.judge(PIPES[name])
    assert (done["code"] == 0) == (name == "out/config.json"), done  # what counts is in the state


@pytest.mark.parametrize("name", ["log.jsonl", "config.json", "state/latest.safetensors"])
@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"step": 1}\n\xff\xfe\n'])
def test_a_damaged_file_of_a_run_is_one_sentence_or_none(case, name, content):
    case.go_on()
    (case.out / name).write_bytes(content)
    done = case.judge(("train", "more.json", "--resume"))
    assert done["code"] == (2 if "state" in name else 0), done


def test_a_state_whose_description_is_nested_without_end_is_refused(tmp_path):
    deep = '{"a":' * 100_000
    save_file({}, tmp_path / "a.safetensors", {"state": deep, "digest": files.digest({}, deep)})
    with pytest.raises(UserError, match="cannot be read"):
        files.load_state(tmp_path / "a.safetensors")


def test_files_without_an_end_are_not_read(tmp_path):
    (tmp_path / "run.toml").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="no regular file"):
        config.load(tmp_path / "run.toml")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"cannot be read: .* bytes, and at most"):
        config.load(tmp_path / "large.json")
    with pytest.raises(UserError, match=r"cannot be read: .* at most"):
        loading._json(tmp_path / "large.json")
    (tmp_path / "data").mkdir()
    (tmp_path / "large.json").rename(tmp_path / "data/metadata.jsonl")
    Image.new("RGB", (9, 9)).save(tmp_path / "data/a.png")
    with pytest.raises(UserError, match=r"cannot be read: .* at most"):
        folders.read(tmp_path / "data", "captions")


# --- names ------------------------------------------------------------------------------------------------------------


def test_what_a_terminal_would_obey_is_written_as_escapes(case):
    assert plain("a\x1b[2J\n\x9b\u202e\udcff é[/]") == "a\\x1b[2J\\n\\x9b\\u202e\\udcff é[/]"
    case.put("data/\x1b[2Jx.png", b"")
    case.put("data/\x9b31m.png", b"")
    assert "\\x1b[2Jx.png" in case.judge(["evaluate", "data", "data"])["out"]
    assert "\\x1b[2J" in refused(case, "sample", "\x1b[2J", "--out", "out")


def test_training_writes_names_of_files_as_escapes_too(case):
    case.put("data/\x1b[2Jx.png", b"")
    case.judge(["train", "run.json", "--dry-run"])


def test_a_name_that_is_empty_is_not_the_working_folder(case):
    assert "A or B is '', which cannot be used: it is empty" in refused(case, "evaluate", "", "data")


@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 300])
def test_a_name_that_no_file_can_have_is_one_sentence(case, name):
    for arguments in (
        ["inspect", name], ["sample", name, "--out", "out"], ["sample", "model", "--out", name], ["evaluate", name, "data"],
        ["evaluate", "data", "data", "--train", name], ["demo", "--out", name],
    ):  # fmt: skip
        assert "cannot be used" in refused(case, *arguments)


@pytest.mark.parametrize("key", ["model", "data", "out"])
@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 300, "a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_is_one_sentence_in_a_config_too(case, key, name):
    case.put("run.json", json.dumps(config_of(**{key: name})).encode())
    assert f"`{key}` is {name[:50]!r}"[:-1] in refused(case, "train", "run.json", "--dry-run")


def test_a_number_too_long_to_be_written_is_named(tmp_path):
    (tmp_path / "run.toml").write_text(f'model = "m"\ndata = "d"\nout = "o"\n[training]\nsteps = 0x{"f" * 9000}\n')
    with pytest.raises(UserError, match=r"`steps` is a int that is too long to be written, expected a whole number"):
        config.load(tmp_path / "run.toml")


def test_markup_in_names_is_text_in_the_report_and_in_the_card():
    name = "<script>alert(1)</script>"
    facts = {
        "settings": {"dataset": name, "steps": 1, "seed": 0}, "pictures": 1, "mse_steps": 1, "cost_ratio": 1.0, "batch": 1, "lr": 1.0, "hardware": name, "date": "",
        "rows": [], "verdict": [name], "network": name, "real_n": 1, "version": "1", "base_steps": 0,
    }  # fmt: skip
    page = report.page(facts, {"trajectory.png": b"", "loss.png": b"", name: b""}, {name: name}, [name])
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5
    assert plan._code("a`b|c\n<x>") == "`a’b¦c\\n<x>`"


@pytest.mark.slow
def test_markup_in_the_name_of_a_folder_is_text_on_the_screen(case):
    case.put("[/x]/keep", b"")
    shutil.copytree(stock() / "data", case.root / "given/[bold]data[/x]")
    case.out = case.root / "given/[/x]/out"
    assert (
        case.judge(["demo", "--steps", "1", "--samples", "16", "--dataset", "[bold]data[/x]", "--out", "[/x]/out"])[
            "code"
        ]
        == 0
    )


def test_the_reader_of_captions_stays_in_its_folder(case):
    for name in ("../victim/x.png", "/etc/x.png", "C:x.png", "a/../../x.png"):
        (case.root / "given/data/metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
        with pytest.raises(UserError, match="within the folder"):
            folders.read(case.root / "given/data", "captions")


def test_paths_that_are_odd_but_possible_are_let_through(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for name in (loop, tmp_path / "none/none", tmp_path / "é [/] \x1b"):
        assert _paths.path(name, "x") == name
