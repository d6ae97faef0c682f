"""Promises of the package about itself: the direction of imports, what `import` loads, docstrings, nothing unsafe."""

import ast
import functools
import graphlib
import importlib
import itertools
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
        "nonfinite",
        "_subset",
    },
    "monitor": BASE | {"objective", "renoising"},
    "comparison": BASE,
    "staged": BASE | {"comparison", "distances", "taps", "_memory", "_restore"},
    "_memory": set(),
    "taps": BASE | {"_restore"},
    "compiled": BASE | {"taps"},
    "features": BASE,
    "_checkpoints": {"taps"},
    "_restore": set(),
    "_subset": BASE | {"staged", "taps", "_restore"},
    "nonfinite": BASE | {"_subset"},
    "copies": {"taps"},
    "precision": BASE,
    "teachers": BASE | {"taps", "compiled", "features", "copies", "precision", "_checkpoints", "_restore"},
    "_peft": {"copies"},
    "_alias": {"_peft", "taps", "copies"},
    "lora": BASE | {"_alias", "teachers", "features"},
}
CHECKING = [name for name in sorted(FILES) if name.startswith("_checking")]
MAY_IMPORT |= {
    name: BASE | set(CHECKING) | {"schedules", "parameterizations", "renoising", "taps"}
    for name in (*CHECKING, "checks")
}
"""The rings of the core, from the inside out; outside of them come the adapters, then inspection, then the command line."""

OUTWARDS = {
    "core": ("adapters", "inspection", "cli", "__"),
    "adapters": ("inspection", "cli", "__"),
    "inspection": ("cli", "__"),
    "cli": ("__main__",),
}
"""What each ring must not import: whatever lies outside of it."""


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


@functools.cache
def of_the_package(name):
    """Modules of the package that a file imports when it runs, anywhere in it."""
    found = set()
    for dotted in imported(TREES[name], name, when_run(TREES[name])):
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
        todo.extend(node.orelse if is_for_types(node) else ast.iter_child_nodes(node))


def is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def when_run(tree):
    """Every statement but those that only a type checker sees."""
    typing = [node for node in ast.walk(tree) if is_for_types(node)]
    hidden = {id(part) for node in typing for line in node.body for part in ast.walk(line)}
    return [node for node in ast.walk(tree) if id(node) not in hidden]


def ring(name):
    return next((ring for ring in ("adapters", "inspection", "cli") if name.split(".")[0] == ring), "core")


def reached(name):
    """Modules of the package that a file imports, itself or through others."""
    found, todo = set(), [name]
    while todo:
        new = of_the_package(todo.pop()) - found
        found |= new
        todo += [module for module in new if module in FILES]
    return found


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
    hidden = ast.parse("if TYPE_CHECKING:\n    import a\nelse:\n    import b\ndef f():\n    import c")
    assert [*imported(hidden, "x", at_module_level(hidden))] == ["b"]
    assert [*imported(hidden, "x", when_run(hidden))] == ["b", "c"]
    assert {ring(name) for name in FILES} == {"core", "adapters", "inspection", "cli"}
    assert {"types", "_shapes", "schedules"} <= reached("objective")


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_the_core_imports_inwards_only(name):
    assert of_the_package(name) <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("__")])
def test_no_ring_imports_what_lies_outside_of_it(name):
    assert not [module for module in of_the_package(name) if module.startswith(OUTWARDS[ring(name)])]


def test_only_running_the_package_imports_the_command_line():
    users = {name for name in FILES if any(ring(module) == "cli" for module in of_the_package(name))}
    assert {name for name in users if ring(name) != "cli"} == {"__main__"}


def test_no_module_imports_itself_through_others():
    graph = {name: of_the_package(name) - {name} for name in FILES if name != "__main__"}
    assert len([*graphlib.TopologicalSorter(graph).static_order()]) >= len(graph)  # a cycle raises


LOSSES = {"objective", "distances", "weights", "renoising", "parameterizations", "timesteps", "staged", "monitor"}
TEACHERS = {"taps", "copies", "precision", "compiled", "teachers", "lora", "_alias", "_peft", "_checkpoints"}


@pytest.mark.parametrize("name", sorted(TEACHERS))
def test_taps_and_teachers_know_nothing_of_losses(name):
    assert not reached(name) & (LOSSES | {"schedules", "checks"})


def test_the_objective_knows_a_teacher_only_as_a_callable():
    assert not reached("objective") & (TEACHERS - {"taps"})  # of taps, `staged` takes the error of a pass left early
    assert "taps" not in of_the_package("objective")


def test_schedules_and_distances_are_the_innermost():
    assert reached("schedules") <= {"types"}
    assert reached("distances") <= {"types", "_shapes"}
    assert reached("parameterizations") <= {"types", "_shapes", "schedules"}
    assert reached("timesteps") <= {"types", "_shapes", "schedules"}


@pytest.mark.parametrize("name", [name for name in FILES if ring(name) == "core"])
def test_the_core_imports_torch_and_the_standard_library_only_anywhere(name):
    found = {dotted.split(".")[0] for dotted in imported(TREES[name], name)}
    assert found <= {"torch", "perceptual_diffusion"} | sys.stdlib_module_names
    assert not found & {"importlib", "pkgutil", "runpy"}, "an import that these tests do not see"


@pytest.mark.parametrize("name", [name for name in FILES if ring(name) in ("adapters", "inspection")])
def test_adapters_and_inspection_import_torch_and_the_standard_library_only_until_they_are_called(name):
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


CONSTANTS = {
    line.target.id: text.value.value
    for tree in TREES.values()
    for line, text in itertools.pairwise(tree.body)
    if isinstance(line, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
}
"""The text below a constant with a type."""


@pytest.mark.parametrize(("module", "name"), EXPORTED)
def test_every_exported_name_has_a_docstring(module, name):
    value = getattr(importlib.import_module(module), name)
    doc = (value.__doc__ if hasattr(value, "__name__") else CONSTANTS.get(name)) or ""
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
