"""Promises of the package about itself: the direction of imports, what `import` loads, docstrings, nothing unsafe."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import perceptual_diffusion

ROOT = Path(perceptual_diffusion.__file__).parent
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
CORE = [name for name in FILES if not name.startswith(("adapters", "cli", "inspection", "__"))]

BASE = {"types", "_shapes"}
MAY_IMPORT = {
    "types": set(),
    "_shapes": {"types"},
    "schedules": BASE,
    "parameterizations": BASE | {"schedules"},
    "timesteps": BASE | {"schedules"},
    "weights": BASE | {"schedules", "parameterizations"},
    "distances": BASE,
    "renoising": BASE | {"schedules", "parameterizations"},
    "objective": BASE
    | {
        "schedules",
        "parameterizations",
        "timesteps",
        "renoising",
        "distances",
        "weights",
        "features",
        "checks",
        "staged",
    },
    "monitor": BASE | {"objective", "renoising"},
    "comparison": BASE,
    "staged": BASE | {"comparison", "distances", "taps"},
    "taps": BASE,
    "compiled": BASE | {"taps"},
    "features": BASE,
    "_checkpoints": set(),
    "copies": {"taps"},
    "precision": BASE,
    "teachers": BASE | {"taps", "compiled", "features", "copies", "precision", "_checkpoints"},
    "_peft": {"copies"},
    "_alias": {"_peft", "taps", "copies"},
    "lora": BASE | {"_alias", "teachers", "features"},
}
CHECKING = [name for name in sorted(FILES) if name.startswith("_checking")]
MAY_IMPORT |= {
    name: BASE | set(CHECKING) | {"schedules", "parameterizations", "renoising"} for name in (*CHECKING, "checks")
}
"""The rings of the core, from the inside out; adapters come after them, the command line after the adapters."""


def imported(tree, name, nodes=None):
    """Dotted names that a file imports, relative ones made absolute."""
    package = ["perceptual_diffusion", *name.split(".")[:-1]]
    for node in ast.walk(tree) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def of_the_package(name):
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for dotted in imported(TREES[name], name):
        if dotted.split(".")[0] == "perceptual_diffusion":
            inner = dotted.removeprefix("perceptual_diffusion").lstrip(".")
            known = [module for module in FILES if inner == module or inner.startswith(f"{module}.")]
            found.add(max(known, key=len, default=inner))
    return found


def at_module_level(tree):
    """Every statement that runs when the file is imported: all but the bodies of functions and `if TYPE_CHECKING`."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        todo.extend(ast.iter_child_nodes(node))


def test_the_checks_see_the_files_and_their_imports():
    assert set(MAY_IMPORT) == set(CORE)
    assert "taps" in of_the_package("teachers")
    assert "schedules" in of_the_package("parameterizations")
    assert "adapters.schedulers" in of_the_package("adapters._wrap")
    relative = ast.parse("from .. import cli\nfrom ._registry import find")
    assert list(imported(relative, "adapters.x")) == [
        "perceptual_diffusion.cli",
        "perceptual_diffusion.adapters._registry.find",
    ]


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_the_core_imports_inwards_only(name):
    assert of_the_package(name) <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", CORE)
def test_the_core_never_imports_adapters_or_the_command_line(name):
    assert not [module for module in of_the_package(name) if module.startswith(("adapters", "cli"))]


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("adapters")])
def test_adapters_never_import_the_command_line(name):
    assert not [module for module in of_the_package(name) if module.startswith("cli")]


def test_taps_and_teachers_know_nothing_of_losses():
    losses = {"objective", "distances", "weights", "renoising", "parameterizations"}
    for name in ("taps", "teachers"):
        assert not of_the_package(name) & losses


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("cli")])
def test_core_and_adapters_import_torch_and_the_standard_library_only(name):
    tree = TREES[name]
    found = {dotted.split(".")[0] for dotted in imported(tree, name, at_module_level(tree))}
    assert found <= {"torch", "perceptual_diffusion"} | sys.stdlib_module_names


HEAVY = (
    "diffusers",
    "timm",
    "torchvision",
    "accelerate",
    "matplotlib",
    "transformers",
    "PIL",
    "typer",
    "rich",
    "sklearn",
)


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, perceptual_diffusion; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


# --- docstrings -------------------------------------------------------------------------------------------------------

EXPORTED = [
    (module.__name__, name)
    for module in (perceptual_diffusion, perceptual_diffusion.adapters)
    for name in module.__all__
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), EXPORTED)
def test_every_exported_name_has_a_docstring(module, name):
    value = getattr(importlib.import_module(module), name)
    doc = value.__doc__ or ""
    assert doc.strip()
    assert not doc.startswith(f"{name}("), "the docstring that a dataclass makes for itself"


DEFINED = [
    (name, node)
    for name, tree in TREES.items()
    if not any(part.startswith("_") and part != "__init__" for part in name.split(".")) and not name.startswith("cli")
    for node in tree.body
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
]


@pytest.mark.parametrize(("name", "node"), DEFINED, ids=[f"{name}.{node.name}" for name, node in DEFINED])
def test_every_public_function_and_class_has_a_docstring(name, node):
    assert ast.get_docstring(node)


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_what_it_is(name):
    assert ast.get_docstring(TREES[name]) or not TREES[name].body


# --- nothing unsafe ---------------------------------------------------------------------------------------------------

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def unsafe(tree, name="x"):
    """What of a file could run code out of a file or a hub: pickles, `torch.load`, remote code, imports by string."""
    found = [
        dotted for dotted in imported(tree, name) if dotted.split(".")[0] in UNSAFE_MODULES or dotted == "torch.load"
    ]
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (node.value.id, node.attr) == ("torch", "load")
        ):
            found.append("torch.load")
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            found.append(node.arg)
        if isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "allow_pickle"):
            found.append(node.value)
        if isinstance(node, ast.Name) and node.id in ("eval", "exec", "__import__"):
            found.append(node.id)
    return found


@pytest.mark.parametrize("name", FILES)
def test_nothing_in_the_package_runs_code_from_files(name):
    assert unsafe(TREES[name], name) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "from torch import load",
        "f(trust_remote_code=True)", "f(**{'trust_remote_code': True})", "numpy.load(x, allow_pickle=True)",
        "eval('1')",
    ],
)  # fmt: skip
def test_the_check_for_unsafe_code_sees_it(code):
    assert unsafe(ast.parse(code))


NARROWING = {("taps", "inner is not None")}
"""Asserts that tell the type checker what the line before has made sure of."""


def test_no_assert_stands_for_a_check_of_input():
    found = {
        (name, ast.unparse(node.test))
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    }
    assert found <= NARROWING
