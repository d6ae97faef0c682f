"""Promises of the release: workflows with least rights and fixed actions, extras that bring what is imported."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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
    assert {".ci/run", ".ci/smoke", ".ci/nightly", ".ci/matrix", "docs/build.py"} <= named
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


# --- dependencies -----------------------------------------------------------------------------------------------------

LOCKS = ("requirements.txt", "requirements-build.txt")


def locked(name):
    """Requirements of a lock, and their hashes."""
    text = (ROOT / ".ci" / name).read_text("utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=", line)
            yield Requirement(requirement), hashes


def ranges(extra=None):
    """What pyproject.toml asks for, with the extras that an extra names."""
    lines = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    for line in lines:
        if own := re.match(r"perceptual-diffusion\[(.*)\]", line):
            for inner in own[1].split(","):
                yield from ranges(inner)
        else:
            yield Requirement(line)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_fixes_every_package_by_version_and_hash_and_names_no_host(name):
    found = list(locked(name))
    assert len(found) > 5
    for requirement, hashes in found:
        assert re.fullmatch(r"==[\w.!+-]+", str(requirement.specifier)), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value.strip()) for value in hashes), requirement
    text = (ROOT / ".ci" / name).read_text("utf-8")
    assert "://" not in text
    assert not re.search(r"^ *-", re.sub(r"^ +--hash=", "", text, flags=re.MULTILINE), re.MULTILINE), "an option"


def test_the_lock_holds_all_that_the_tests_need_in_the_ranges_that_are_allowed():
    found = {requirement.name.lower().replace("_", "-"): requirement for requirement, _ in locked("requirements.txt")}
    for needed in [
        *ranges(),
        *ranges("dev"),
        Requirement("hatchling>=1.25"),
        Requirement("pip-audit"),
        Requirement("editables"),
    ]:
        exact = found[needed.name.lower().replace("_", "-")]
        assert needed.specifier.contains(str(exact.specifier).removeprefix("==")), exact


def test_dependencies_have_floors_and_no_ceilings():
    """CONTRIBUTING.md says why; torchvision and torch go together, so torch's floor is enough."""
    for extra in (None, *PROJECT["optional-dependencies"]):
        for requirement in ranges(extra):
            signs = {part.operator for part in requirement.specifier}
            assert signs <= {">=", "!="}, requirement
            assert ">=" in signs or requirement.name == "torchvision", requirement


def test_a_release_is_built_from_locked_tools_alone():
    text = (ROOT / ".github/workflows/publish.yml").read_text("utf-8")
    build = text[text.index("  build:") : text.index("  smoke:")]
    assert re.findall(r"pip install (.+)", build) == ["--require-hashes -r .ci/requirements-build.txt"]
    assert "build --no-isolation" in build
    assert "needs: [build, smoke]" in text
    assert "id-token" not in text[: text.index("  publish:")]


def test_every_night_the_slow_tests_the_oldest_the_newest_and_the_locked_versions_run():
    text = (ROOT / ".github/workflows/nightly.yml").read_text("utf-8")
    assert set(re.findall(r"run: bash (\S+)", text)) == {".ci/nightly", ".ci/matrix", ".ci/locked"}
    assert re.findall(r"versions: (\w+)", text) == ["oldest", "newest"]
    script = (ROOT / ".ci/locked").read_text("utf-8")
    assert "--require-hashes -r .ci/requirements.txt" in script
    assert 'pip-audit" --strict' in script  # else a package that could not be looked up counts as a good one


def test_dependabot_proposes_newer_actions_and_locked_packages():
    text = (ROOT / ".github/dependabot.yml").read_text("utf-8")
    assert re.findall(r"package-ecosystem: (\S+)\n    directory: (\S+)", text) == [
        ("github-actions", "/"),
        ("pip", "/.ci"),
    ]
