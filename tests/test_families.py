"""The table of families: complete for the installed diffusers, documented, and open to other people's models."""

import json
import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import diffusers
import pytest
import torch
from paper import PaperObjective
from zoo import NO_CPU_BACKWARD, REFUSED, ROWS, build
from zoo.nested import mapped

from perceptual_diffusion import adapters
from perceptual_diffusion.adapters.diffusers import FAMILIES, Family

ROOT = Path(__file__).parents[1]

NO_DENOISERS = {
    "AceStepAudioTokenDetokenizer", "AceStepAudioTokenizer", "AceStepConditionEncoder", "AnimaTextConditioner",
    "AudioLDM2ProjectionModel", "CLIPImageProjection", "Ideogram4PromptEnhancerHead", "Kandinsky6SRLatentUpscalerBank",
    "MiniMaxMusic3ConditionEncoder", "MiniMaxMusic3RVQDepthDecoder", "MotionAdapter", "MultiAdapter",
    "ReduxImageEncoder", "StableAudio3DurationEmbedder", "StableAudioProjectionModel", "T2IAdapter",
    "UniDiffuserTextDecoder",
}  # fmt: skip
"""What diffusers exports as a model besides denoisers, ControlNets and autoencoders."""


def denoisers():
    """Every denoiser class that the installed diffusers exports."""
    exported = (getattr(diffusers, name, None) for name in dir(diffusers))
    models = [m for m in exported if isinstance(m, type) and issubclass(m, diffusers.ModelMixin)]
    beside = ("controlnet", "autoencoder", "vae")
    names = {m.__name__ for m in models if not any(word in m.__module__.lower() for word in beside)}
    return names - NO_DENOISERS - {"ModelMixin"}


def test_every_denoiser_of_diffusers_is_in_the_table_and_in_the_zoo():
    names = denoisers()
    assert names, "diffusers exports no model"
    assert sorted(names - set(FAMILIES)) == []
    assert sorted(names - {row.split(".")[0] for row in ROWS} - set(REFUSED)) == []


@pytest.mark.skipif(not diffusers.__version__.startswith("0.42"), reason="the list is that of diffusers 0.42")
def test_the_table_has_the_87_denoisers_of_diffusers_042_and_nothing_else():
    assert set(FAMILIES) == denoisers()
    assert len(FAMILIES) == 87


def test_the_page_of_the_families_is_the_table():
    page = subprocess.run(
        [sys.executable, ROOT / "tools" / "adapters_table.py"], capture_output=True, text=True, check=True
    ).stdout
    assert (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8") == page


@pytest.mark.parametrize("name", sorted(NO_CPU_BACKWARD))
def test_flex_attention_says_that_it_needs_a_gpu(name):
    model, tiny = build(name)
    objective = PaperObjective.wrap(model, tiny.scheduler())
    with pytest.raises(ValueError, match=f"{name} uses FlexAttention, which has no backward on a CPU. Move the model"):
        objective(model, mapped(torch.clone, tiny.clean), cond=tiny.cond)


def test_a_family_of_another_unit_of_time_is_refused():
    with pytest.raises(ValueError, match="`time` is 'seconds', expected one of 'schedule', 'timestep', 'unit'"):
        Family(modality="x", middle="0", time="seconds").adapter("X", torch.nn.Sequential(torch.nn.Linear(1, 1)))


# --- other people's models: the two examples --------------------------------------------------------------------------


def between(path, start, end):
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines[lines.index(start) + 1 : lines.index(end)] if line]


def test_the_example_of_an_own_adapter_has_fifteen_lines_and_works(monkeypatch):
    from perceptual_diffusion.adapters import _registry

    monkeypatch.setattr(_registry, "_factories", dict(_registry._factories))
    path = ROOT / "examples" / "own_adapter.py"
    assert len(between(path, "# the adapter", "# end of the adapter")) <= 15
    names = runpy.run_path(str(path), run_name="example")
    model = names["Tiny"]()
    assert adapters.find(model).family == "Tiny"
    runpy.run_path(str(path), run_name="__main__")


def test_the_example_of_a_plug_in_is_found_by_its_entry_point(tmp_path):
    plugin = ROOT / "examples" / "plugin"
    lines = (plugin / "tiny_denoiser.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines[lines.index("def register_adapters() -> None:") :] if line]) <= 15
    groups = tomllib.loads((plugin / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    info = tmp_path / "tiny_denoiser-1.0.dist-info"  # what installing it writes
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-denoiser\nVersion: 1.0\n")
    written = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items())
    (info / "entry_points.txt").write_text("".join(written))
    code = """
import json, torch
from perceptual_diffusion import SelfPerceptualObjective, adapters, schedules
from tiny_denoiser import Tiny
model = Tiny()
objective = SelfPerceptualObjective.wrap(model, schedules.Linear(), prediction="flow_prediction")
print(json.dumps([adapters.find(model).family, float(objective(model, torch.randn(2, 3, 6, 6)))]))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(plugin)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    family, loss = json.loads(done.stdout)
    assert family == "Tiny"
    assert loss > 0
