"""The tutorials run: in a few steps here, whole with `-m slow`. Their data are what their notice says."""

import base64
import inspect
import io
import re
import runpy
import subprocess
import sys
import wave
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

FOLDER = Path(__file__).parents[1] / "docs/tutorials"
SCRIPTS = sorted(FOLDER.glob("plot_*.py"))
QUICK = re.compile(r"^# sphinx_gallery_start_ignore\n(.*?)^# sphinx_gallery_end_ignore\n", re.MULTILINE | re.DOTALL)
each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a tutorial in its own folder, in a few steps, and give its names, what it printed and how many figures it drew."""

    def run(name):
        monkeypatch.chdir(FOLDER)
        monkeypatch.setenv("TUTORIALS_QUICK", "1")
        plt.switch_backend("agg")
        names = runpy.run_path(str(FOLDER / f"{name}.py"))
        figures = len(plt.get_fignums())
        plt.close("all")
        return names, capsys.readouterr().out, figures

    return run


def test_there_is_a_tutorial_for_each_modality_and_one_on_the_teacher():
    assert [script.stem.split("_", 2)[2] for script in SCRIPTS] == [
        "image", "teacher", "unconditional", "dit_flow", "audio", "video",
    ]  # fmt: skip


@each
def test_it_has_the_structure_that_the_gallery_wants(script):
    text = script.read_text("utf-8")
    title, underline, blank, first, *_ = re.match(r'r?"""\n(.*?)"""\n', text, re.DOTALL)[1].split("\n")
    assert title
    assert underline == "=" * len(title)
    assert not blank
    assert first
    assert text.count("\n# %%\n# ") >= 3
    assert max(map(len, text.splitlines())) <= 130
    for heading, line in re.findall(r"^# (.+)\n# (-{3,})$", text, re.MULTILINE):
        assert len(heading) == len(line)


@each
def test_its_quick_mode_only_sets_numbers_that_it_has_and_is_not_shown(script):
    text = script.read_text("utf-8")
    (hidden,) = QUICK.findall(text)
    shown = QUICK.sub("", text)
    assert "TUTORIALS_QUICK" not in shown
    lines = hidden.strip().splitlines()
    assert lines[0].startswith("import os")
    assert lines[2] == 'if os.environ.get("TUTORIALS_QUICK"):'
    (names,) = [line.split(" = ")[0].strip().split(", ") for line in lines[3:]]
    (known,) = re.findall(r"^([A-Z_]+(?:, [A-Z_]+)+) = ", shown.partition("\n# %%")[0], re.MULTILINE)
    assert set(names) <= set(known.split(", "))
    assert "TUTORIALS_QUICK=1" in (FOLDER / "GALLERY_HEADER.rst").read_text("utf-8")


@each
def test_no_result_is_typed_into_the_prose(script):
    """Of decimals, prose names only what the code sets; results are printed."""
    text = script.read_text("utf-8")
    prose = "\n".join(line for line in text.splitlines() if line.startswith("# "))
    assert not re.findall(r"\d+\.\d{2,}|\d %|±", prose)


@each
def test_its_links_lead_to_pages(script):
    for page in re.findall(r":doc:`(?:[^`<]*<)?/([^`>]+)>?`", script.read_text("utf-8")):
        assert (FOLDER.parent / f"{page}.md").exists()


def test_the_image_tutorial_trains_samples_and_measures(run):
    names, text, figures = run("plot_1_image")
    assert figures == 2
    assert set(names["samples"]) == {"base", "MSE", "self-perceptual"}
    assert names["steps"]["MSE"] > names["steps"]["self-perceptual"]
    assert "'epsilon' cannot give back the clean sample" in text
    assert re.search(r"KID, self-perceptual minus MSE: [+-]\d+ ± \d+ with N = 4: (lower|HIGHER|no clear change)", text)


def test_the_teacher_answers_to_coarse_errors_and_hardly_to_fine_ones(run):
    names, _, figures = run("plot_2_teacher")
    assert figures == 3
    assert names["strongest"] < names["weakest"]
    assert float(names["answer"][:, 0].min()) > 1 > float(names["answer"][:, -1].max())
    parts = names["split"](names["white"])
    assert torch.allclose(parts.sum(0), names["white"] - names["white"].mean((2, 3), keepdim=True), atol=1e-5)


def test_the_unconditional_tutorial_trains_samples_and_measures(run):
    names, text, figures = run("plot_3_unconditional")
    assert figures == 1
    assert names["samples"]["self-perceptual"].shape == (66, 1, 8, 8)
    x = torch.randn(50, 4, dtype=torch.float64)
    assert abs(names["frechet"](x, x)) < 1e-6
    assert names["frechet"](x, x + 1) == pytest.approx(4)
    assert text.count("against MSE") == 3


def test_the_transformer_tutorial_finds_its_middle_and_probes_every_block(run):
    names, text, figures = run("plot_4_dit_flow")
    assert figures == 2
    assert "the middle: blocks.3" in text
    assert names["names"] == [f"blocks.{k}" for k in range(6)]
    assert not torch.equal(names["student"].patch.weight, names["base"].patch.weight)


def test_the_sounds_can_be_played_and_come_back_from_their_spectra(run):
    names, _, figures = run("plot_5_audio")
    assert figures == 2
    html = names["Players"]({"a": names["sounds"][:2]})._repr_html_()
    players = re.findall(r'src="data:audio/wav;base64,([^"]+)"', html)
    assert len(players) == 2
    with wave.open(io.BytesIO(base64.b64decode(players[0]))) as file:
        assert (file.getframerate(), file.getnframes()) == (8000, 4096)
    spectra = names["spectra"]
    again = names["to_model"](names["to_sound"](spectra[:20]))
    assert float((again - spectra[:20]).square().mean()) < 0.1 * float(spectra.var())


def test_the_clips_move_and_come_back_from_what_the_model_sees(run):
    names, _, figures = run("plot_6_video")
    assert figures == 1
    clips = names["train"][:2]
    assert torch.equal(names["to_clips"](names["to_model"](clips)), clips)
    (data,) = re.findall(r'src="data:image/gif;base64,([^"]+)"', names["Gif"]({"a": clips})._repr_html_())
    with Image.open(io.BytesIO(base64.b64decode(data))) as gif:
        assert gif.n_frames == 8
    assert len(names["clips"]) == len(names["frames"]) - 7 * 3
    last_trained, first_held_out = len(names["train"]) - 1 + 7 * 3, len(names["clips"]) - len(names["held_out"])
    assert last_trained < first_held_out


@pytest.mark.parametrize("name", ["plot_5_audio", "plot_6_video"])
def test_a_missing_file_ends_in_one_sentence(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"is not here\. Run this in the folder docs/tutorials of a clone\.$"):
        runpy.run_path(str(FOLDER / f"{name}.py"))


def test_the_data_are_small_and_their_notice_names_each_of_them():
    data = FOLDER / "data"
    assert sum(path.stat().st_size for path in data.iterdir() if path.is_file()) < 1_000_000
    notice = (data / "NOTICE.txt").read_text("utf-8")
    assert {path.name for path in data.iterdir() if path.is_file()} == {
        "NOTICE.txt", "build.py", "bunny.webp", "drums.wav",
    }  # fmt: skip
    assert "Blender Foundation" in notice
    sounds = re.findall(r"^(?:bd|sn|tabla|drum|elec)_\w+ .+ https://freesound\.org/\S+$", notice, re.MULTILINE)
    with wave.open(str(data / "drums.wav")) as file:
        assert file.getnframes() == 4096 * len(sounds)


@pytest.mark.slow
@each
def test_the_whole_tutorial_takes_about_a_minute_of_one_core_at_most(script, tmp_path):
    code = inspect.cleandoc(
        f"""
        import runpy, resource, matplotlib
        matplotlib.use("agg")
        names = runpy.run_path({script.name!r})
        if {script.stem!r} == "plot_2_teacher":  # what its prose says
            left = names["left"]
            assert left["L_sp"][-1] > 0.8 and left["L_sp, normalised"][-1] > 0.8, left
            assert left["L_mse + L_sp, normalised"][-1] < 0.4 and left["L_mse"][-1] < 0.4, left
            assert left["L_sp"][0] < 0.5 * left["L_sp"][-1], left
        used = resource.getrusage(resource.RUSAGE_SELF)
        assert used.ru_utime + used.ru_stime < 120, used  # 60 where the core's sibling is idle
        """
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
