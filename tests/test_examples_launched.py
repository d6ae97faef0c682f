"""Every example runs under `accelerate launch` in two processes that draw times and noise of their own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("[!_]*.py") if "smoke" in path.read_text("utf-8"))


def test_the_examples_are_found():
    named = "audio dit drop_in edm image lora sd3_flux sdxl unconditional video"
    assert named.split() == SCRIPTS
    assert "grep -l smoke ./[!_]*.py" in (EXAMPLES.parent / ".ci/smoke").read_text()  # and it runs the same ones


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_end_well_with_streams_of_their_own(script, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # accelerate 1.15 starts one process alone for `--cpu --num_processes 2`; this is how it starts two without a GPU
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", port, str(EXAMPLES / f"{script}.py"), "--smoke", "--out", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = sorted((tmp_path / "out").rglob("checkpoint.json"), key=lambda path: path.stat().st_mtime)
    assert all(json.loads(path.read_text())["processes"] == 2 for path in saved)
    first, second = (load_file(saved[-1].parent / f"objective-{rank}.safetensors")["generator"] for rank in range(2))
    assert not torch.equal(first, second)
