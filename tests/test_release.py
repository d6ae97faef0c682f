"""Promises of the release: workflows with least rights and fixed actions, extras that bring what is imported."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NAMES = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}
"""Modules whose distribution has another name."""


def brought_by(extra):
    """Names of the distributions that an extra brings, with those of the extras it names."""
    found = {re.match(r"[\w.-]+", x)[0].lower() for x in PROJECT["dependencies"]}
    for line in PROJECT["optional-dependencies"][extra]:
        own = re.match(r"perceptual-diffusion\[(.*)\]", line)
        found |= set().union(*map(brought_by, own[1].split(","))) if own else {re.match(r"[\w.-]+", line)[0].lower()}
    return found


def imported(path):
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_fixed_by_its_commit(path):
    used = re.findall(r"uses: *(.+)", path.read_text("utf-8"))
    assert used
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", line.strip()) for line in used)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_only_read_and_keep_no_credentials(path):
    text = path.read_text("utf-8")
    assert re.search(r"^permissions:\n  contents: read\n", text, re.MULTILINE)
    rights = re.findall(r"^ +([\w-]+): (?:write|admin)\b", text, re.MULTILINE)
    assert rights == (["id-token"] if path.name == "publish.yml" else [])
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    assert "secrets." not in text
    assert "pull_request_target" not in text
    assert all("${{ github" not in line for line in re.findall(r"run: *(.+)", text))


def test_scripts_that_workflows_and_papers_name_are_there():
    text = "".join(path.read_text("utf-8") for path in [*WORKFLOWS, ROOT / "RELEASING.md", ROOT / "CONTRIBUTING.md"])
    named = set(re.findall(r"(?:bash|python) ((?:\.ci|docs)/[\w.]+)", text))
    assert {".ci/run", ".ci/smoke", ".ci/nightly", ".ci/floors", "docs/build.py"} <= named
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize(
    ("extra", "files"), [("examples", "examples/*.py"), ("docs", "docs/tutorials/*.py"), ("docs", "docs/*.py")]
)
def test_an_extra_brings_what_is_imported(extra, files):
    paths = sorted(ROOT.glob(files))
    assert paths
    own = {path.stem for path in paths} | {"perceptual_diffusion"} | set(sys.stdlib_module_names)
    modules = {name for path in paths for name in imported(path)} - own
    needed = {NAMES.get(name, name).replace("_", "-") for name in modules}
    indirect = {"numpy", "huggingface-hub"}  # of torch and diffusers
    assert needed - indirect <= brought_by(extra)
