"""The documentation holds: its code runs, its options exist, its links lead somewhere, every error has its entry.

- Each ```python block of docs/*.md and docs/how_to/*.md runs, those of a page in order and in one namespace, in which some
  pages find what `SETUP` gives them. `<!-- not run: reason -->` above a block leaves it out.
- docs/troubleshooting.md names every message that the package raises or warns with.
- docs/concepts.md names functions and tests that exist.
"""

import ast
import contextlib
import io
import re
import runpy
import shlex
import sys
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from models import conditional_unet, unet

from perceptual_diffusion.checks import FAULTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "perceptual_diffusion"
PAGES = sorted([*DOCS.glob("*.md"), *(DOCS / "how_to").glob("*.md")])
BLOCK = re.compile(r"(?:^<!-- not run: (.+) -->\n)?^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^( *)(```+|~~~+|:::+)\{?[^\n]*\n.*?^\1\2", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """The reason not to run it, the first line and the code of each block of a page."""
    text = page.read_text("utf-8")
    return [
        (match[1], text[: match.start(3)].count("\n"), match[3])
        for match in BLOCK.finditer(text)
        if match[2] == language
    ]


# --- Python -----------------------------------------------------------------------------------------------------------


def batch():
    """What most pages speak of: a small text-conditional UNet, its scheduler, and a batch."""
    from diffusers import DDPMScheduler

    model, scheduler = conditional_unet(), DDPMScheduler(prediction_type="v_prediction")
    latents, noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    timesteps, cond = torch.tensor([100, 400]), {"encoder_hidden_states": text}
    return {
        "model": model, "scheduler": scheduler, "noise_scheduler": scheduler, "latents": latents, "clean": latents,
        "noise": noise, "timesteps": timesteps, "text": text, "cond": cond,
        "model_pred": model(scheduler.add_noise(latents, noise, timesteps), timesteps, **cond).sample,
    }  # fmt: skip


def wrapping():
    from perceptual_diffusion import SelfPerceptualObjective

    return batch() | {"SelfPerceptualObjective": SelfPerceptualObjective}


def outside():
    from test_outside import LABELS, backbone, vae

    model = unet(in_channels=4, out_channels=4)
    names = batch() | {
        "model": model,
        "cond": LABELS,
        "backbone": backbone(),
        "vit": backbone("test_vit"),
        "vae": vae(),
    }
    x_t = names["scheduler"].add_noise(names["latents"], names["noise"], names["timesteps"])
    return names | {"model_pred": model(x_t, names["timesteps"], **LABELS).sample}


def alone():
    """Nothing: the page can be followed from its first line."""
    return {}


SETUP = {
    "start.md": alone, "concepts.md": alone, "write_an_adapter.md": alone, "outside_teachers.md": outside,
    "compile.md": wrapping, "precision.md": wrapping,
}  # fmt: skip

NEEDS = {"precision.md": "torchao", "logging.md": "tensorboard"}
"""What a page uses and the package's extras do not bring."""


@contextlib.contextmanager
def one_process(folder):
    """What a launcher gives: a process group, here of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def forgotten():
    """Lets accelerate forget the processes that a page set up."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    monkeypatch.chdir(tmp_path)
    names = SETUP.get(page.name, batch)()
    with one_process(tmp_path) if page.name == "several_processes.md" else contextlib.nullcontext():
        for reason, line, code in blocks(page, "python"):
            if reason is None:
                exec(compile("\n" * line + code, str(page), "exec"), names)


def test_few_blocks_are_not_run_and_each_says_why():
    left_out = {
        f"{page.name}:{line}": reason
        for page in PAGES
        for language in ("python", "bash")
        for reason, line, _ in blocks(page, language)
        if reason
    }
    assert len(left_out) <= 6, left_out
    assert all(len(reason) > 10 for reason in left_out.values()), left_out
    for page in PAGES:
        assert page.read_text("utf-8").count("<!-- not run") == sum(p.startswith(f"{page.name}:") for p in left_out)


# --- commands ---------------------------------------------------------------------------------------------------------

OPTION = re.compile(r"--?[a-z]")
OTHERS = {
    "pip",
    "pytest",
    "tensorboard",
    "git",
    "patch",
    "cd",
    "export",
    "ruff",
    "mypy",
    "pre-commit",
    "torchrun",
    "bash",
    "#",
}
"""Programs of other people, whose options are not looked at."""


@cache
def help_of(script):
    """The options that the help of a script lists."""
    printed, file = io.StringIO(), ROOT / script
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.simplefilter("ignore")
        patch.setattr(sys, "argv", [script, "--help"])
        patch.syspath_prepend(str(file.parent))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(file), run_name="__main__")
    assert not ended.value.code
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", printed.getvalue()))


def options_of(words):
    """The options that a command knows, or None where it is not one of ours; an AssertionError where nobody knows it."""
    program, rest = Path(words[0]).name, words[1:]
    if program == "perceptual-diffusion":
        import typer

        from perceptual_diffusion.cli._app import app

        command = typer.main.get_command(app)
        sub = command.commands.get(rest[0]) if rest else None
        assert sub is not None, f"perceptual-diffusion has no command {rest[:1]}"
        return {name for parameter in sub.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    if program in ("python", "python3") and rest[0] == "-m":
        return options_of(["perceptual-diffusion", *rest[2:]]) if rest[1] == "perceptual_diffusion" else None
    known = set()
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        known = set(launch_command_parser()._option_string_actions)
        if "-m" in rest:
            at = rest.index("-m")
            assert rest[at + 1] == "perceptual_diffusion"
            return known | options_of(["perceptual-diffusion", *rest[at + 2 :]])
    script = next((word for word in rest if word.endswith(".py")), None)
    if script and program in ("python", "python3", "accelerate"):
        assert (ROOT / script).is_file(), f"there is no {script}"
        return known | (help_of(script) if any(map(OPTION.match, rest[rest.index(script) :])) else set())
    assert program in OTHERS, f"unknown program {program}"
    return None


COMMANDS = [
    pytest.param(line, id=f"{page.stem}: {line[:60]}")
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for reason, _, code in blocks(page, "bash")
    if reason is None
    for joined in code.replace("\\\n", " ").splitlines()
    for line in joined.split("&&")
    if line.strip() and not line.strip().startswith("#")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_a_command_exist(command):
    words = [word for word in shlex.split(command, comments=True) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    known = options_of(words)
    if known is not None:
        given = {word.partition("=")[0] for word in words[1:] if OPTION.match(word)} - {"-m"}
        assert given <= known, f"{sorted(given - known)} in: {command}"


# --- links ------------------------------------------------------------------------------------------------------------

FOLDERS_MADE = ("_build", "gallery", "generated")
"""Folders of docs that the build of the site makes."""
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")] + [
    page for page in sorted(DOCS.rglob("*.md")) if not set(FOLDERS_MADE) & set(page.relative_to(DOCS).parts)
]


@cache
def anchors(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text, found = FENCE.sub("", page.read_text("utf-8")), []
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return {*found, *re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text("utf-8")))
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if set(FOLDERS_MADE) & set(Path(path).parts):
            continue
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place)):
            wrong.append(target)
    assert not wrong


# --- tables -----------------------------------------------------------------------------------------------------------


def columns(page, *names):
    """The cells in these columns, row by row, of every table of a page that has them all."""
    rows, head = [], None
    for line in page.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")] if line.startswith("|") else None
        if cells is None:
            head = None
        elif head is None:
            head = cells
        elif set(names) <= set(head) and not set(line) <= set("|-: "):
            assert len(cells) == len(head), line
            rows.append([cells[head.index(name)] for name in names])
    return rows


def spans(cell):
    """The code spans of a cell."""
    return [a or b for a, b in re.findall(r"``\s?(.+?)\s?``(?!`)|`([^`]+)`", cell)]


COUNTED = (
    "model, resolution", "self-perceptual", "LPIPS-VGG on pixels", "LPL, decoder's middle", "LPL, middle and 2 up blocks",
    "REPA, DINOv2-B",
)  # fmt: skip
COMPARED = ("self-perceptual", "LPIPS-VGG on pixels", "LPL, decoder's middle; middle and 2 up blocks", "REPA, DINOv2-B")


def test_every_equation_names_functions_and_tests_that_exist():
    rows = columns(DOCS / "concepts.md", "equation", "function", "test")
    numbers = {int(n) for equation, *_ in rows for a, b in re.findall(r"\((\d+)(?:[–-](\d+))?\)", equation)
               for n in range(int(a), int(b or a) + 1)}  # fmt: skip
    assert numbers >= {2, *range(8, 13), *range(14, 18)}
    for equation, function, test in rows:
        assert spans(function), equation
        assert spans(test), equation
        for name in spans(function):
            module, *path = name.split(".")
            found = import_module(f"perceptual_diffusion.{module}")
            for part in path:
                found = getattr(found, part)
            assert callable(found), name
        for name in spans(test):
            file, _, test_name = name.partition("::")
            tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
            assert test_name in {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}, name


def test_the_costs_that_are_compared_are_the_counted_ones():
    counted = {row[0]: row[1:] for row in columns(DOCS / "cost.md", *COUNTED)}
    for model, *told in columns(DOCS / "comparison.md", "model", *COMPARED):
        expected = [cell.split(",")[0] for cell in counted[model.removesuffix(" (pixels)")]]
        assert told == [*expected[:2], "; ".join(expected[2:4]).replace("–; –", "–"), expected[4]], model


# --- messages ---------------------------------------------------------------------------------------------------------

LEAST = 8
"""Letters that a message or a pattern must have of its own to say which it is."""


def text_of(node):
    """A message as it is written, with … for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[srd]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return "…"


def messages_of(path):
    """(place, message) of each error that a file makes and of each warning that it gives."""
    tree = ast.parse(path.read_text("utf-8"))
    functions = {f.name: f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
    warning = {call for name, f in functions.items() if "warn" in name for call in ast.walk(f)}
    for call in (x for x in ast.walk(tree) if isinstance(x, ast.Call) and x.args):
        name = ast.unparse(call.func)
        if not (re.search(r"(Error|_Plain|warnings\.append|\.echo)$|^(warnings\.warn|logger\.warning|log|named)$", name)
                or (call in warning and name.endswith(".append"))):  # fmt: skip
            continue
        second = name.endswith(("SetupError", "named")) or (name == "OSError" and len(call.args) > 1)  # after errno
        message = call.args[1] if second else call.args[0]
        made_by = functions.get(ast.unparse(message.func)) if isinstance(message, ast.Call) else None
        made = [r.value for r in ast.walk(made_by) if isinstance(r, ast.Return)] if made_by else [message]
        for node in made:
            text = text_of(node)
            if len(re.findall(r"[a-z]", text)) >= LEAST:  # else it passes on what another one says
                yield f"{path.relative_to(ROOT)}:{call.lineno}", text


@cache
def messages():
    return [found for path in sorted(PACKAGE.rglob("*.py")) for found in messages_of(path)]


@cache
def patterns():
    """Each pattern of the page, a regular expression for the head of a message; … is one thing filled in, or one word."""
    found = {}
    for (cell,) in columns(DOCS / "troubleshooting.md", "message"):
        assert spans(cell), cell
        for span in spans(cell):
            assert len(re.findall(r"[a-z]", span)) >= LEAST, span
            found[span] = re.compile(r"\S*".join(re.escape(part) for part in span.split("…")))
    return found


def test_every_message_of_the_package_has_an_entry():
    missing = [f"{place}: {text}" for place, text in messages() if not any(p.match(text) for p in patterns().values())]
    assert not missing, "docs/troubleshooting.md lacks:\n" + "\n".join(missing)


def test_every_entry_is_of_a_message_that_exists():
    texts = [text for _, text in messages()]
    assert not [span for span, pattern in patterns().items() if not any(map(pattern.match, texts))]


def test_every_entry_has_a_cause_and_a_fix():
    rows = columns(DOCS / "troubleshooting.md", "message", "cause", "fix")
    assert len(rows) == len(columns(DOCS / "troubleshooting.md", "message"))
    assert not [message for message, cause, fix in rows if min(len(cause), len(fix)) < LEAST]


def test_every_fault_of_check_is_explained():
    named = [span for (cell,) in columns(DOCS / "troubleshooting.md", "fault") for span in spans(cell)]
    assert set(named) == set(FAULTS)


def test_messages_are_found_however_they_are_written(tmp_path):
    file = PACKAGE / "checks.py"
    code = """
def words(name):
    return f"the thing {name!r} is wrong in " + name
def f(x):
    raise ValueError(words(x))
def g(x):
    raise SetupError("fault", f"`{x}` is of no use here")
def h(error):
    logger.warning("the weights %s were replaced", error)
    raise UserError(str(error)) from error
"""
    (tmp_path / "code.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(__name__ + ".ROOT", tmp_path)
        found = [text for _, text in messages_of(tmp_path / "code.py")]
    assert sorted(found) == ["`…` is of no use here", "the thing … is wrong in …", "the weights … were replaced"]
    assert any(file.samefile(ROOT / place.partition(":")[0]) for place, _ in messages())
