"""The site's settings: `python docs/build.py` builds it, offline."""

import ast
import dataclasses
import inspect
import os
import re
import textwrap
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports diffusers

from diffusers import UNet2DModel  # noqa: F401  (what it says while it is imported would stand on the first tutorial's page)
from sphinx.application import Sphinx

import perceptual_diffusion

HERE = Path(__file__).parent
ROOT = HERE.parent
LANGUAGES = {".py": "python", ".toml": "toml", ".patch": "diff", ".diff": "diff"}

project = "perceptual-diffusion"
author = "The perceptual-diffusion authors"
project_copyright = f"2026, {author}"
release = perceptual_diffusion.__version__
version = ".".join(release.split(".")[:2])

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "tutorials/**", "gallery/**"]
smartquotes_action = "D"  # dashes; t' is no quotation
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!perceptual_diffusion).*")]  # torch's and Python's sites are not reached offline

gallery = any((HERE / "tutorials").glob("plot_*.py")) and not os.environ.get("DOCS_NO_GALLERY")
if gallery:
    extensions.append("sphinx_gallery.gen_gallery")
    exclude_patterns.remove("gallery/**")
    exclude_patterns += ["gallery/**/*.py", "gallery/**/*.ipynb", "gallery/**/*.md5", "gallery/**/*.json"]
    sphinx_gallery_conf = {
        "examples_dirs": "tutorials",
        "gallery_dirs": "gallery",
        "filename_pattern": r"plot_",
        "within_subsection_order": "FileNameSortKey",
        "capture_repr": ("_repr_html_",),
        "abort_on_example_error": True,
        "download_all_examples": False,
        "remove_config_comments": True,
        "show_memory": False,
        "show_signature": False,
        "min_reported_time": 0,
        "write_computation_times": False,
    }

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
mathjax_path = "mathjax/tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}  # its menu would load files that are not in the site
copybutton_prompt_text = "$ "

napoleon_use_ivar = True  # else fields of dataclasses would stand twice
napoleon_attr_annotations = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 90
add_module_names = False

html_title = "perceptual-diffusion"
html_theme = "pydata_sphinx_theme"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_domain_indices = html_use_index = False
html_sidebars = {page: [] for page in ("index", "start", "concepts", "examples")}  # they have no pages below them
html_context = {"default_mode": "auto"}
html_theme_options = {
    "logo": {"text": "perceptual-diffusion"},
    "check_switcher": False,  # it is a file of this site: nothing is asked for while building
    "switcher": {
        "json_url": os.environ.get("DOCS_URL", "").rstrip("/") + "/_static/switcher.json",
        "version_match": version,
    },
    "navbar_align": "left",
    "navbar_end": ["version-switcher", "theme-switcher"],
    "navbar_persistent": ["search-button-field"],
    "header_links_before_dropdown": 8,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def examples() -> str:
    """Give a section for each script and folder of examples/: its name, what its docstring says, its files folded."""
    sections = []
    for path in sorted((ROOT / "examples").glob("[!_.]*")):
        files = [path] if path.suffix == ".py" else sorted(path.rglob("[!_.]*.*")) if path.is_dir() else []
        files = [file for file in files if file.suffix in LANGUAGES]
        scripts = [file for file in files if file.suffix == ".py"]
        if not scripts:
            continue
        says = ast.get_docstring(ast.parse(scripts[0].read_text("utf-8"))) or ""
        says = re.sub(
            r"^(?! {4}).*", lambda line: re.sub(r"(?<![\w`-])--[a-z][\w-]*", r"`\g<0>`", line[0]), says, flags=re.M
        )
        sections.append(f"## {path.stem}\n\n{says if path in files else ''}\n")
        for file in files:
            name, language = file.relative_to(ROOT).as_posix(), LANGUAGES[file.suffix]
            shown = f":::{{literalinclude}} ../{name}\n:language: {language}\n:::"
            sections.append(f"::::{{dropdown}} {name}\n{shown}\n::::\n")
    return "\n".join(sections)


def read_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Fill the page of examples, and turn links that leave docs/ to pages of the site that hold the same."""
    text = source[0].replace("<!-- the examples -->", examples()) if page == "examples" else source[0]
    text = re.sub(r"\]\((?:\.\./)+examples/(\w+)(?:\.py)?/?\)", r"](/examples.md#\1)", text)
    text = re.sub(r"\]\((?:\.\./)+(CHANGELOG|CONTRIBUTING)\.md\)", lambda m: f"](/{m[1].lower()}.md)", text)
    text = re.sub(r"\]\((?:\.\./)+README\.md\)", "](/index.md)", text)
    if gallery:
        text = re.sub(r"\]\((?:\.\./)*tutorials/(plot_\w+)\.py\)", r"](/gallery/\1.rst)", text)
    # a pattern of a toctree that no page fits (the gallery, where it is left out) would be a warning
    source[0] = re.sub(
        r"^([a-z_/]+)\*$\n",
        lambda m: m[0] if any(f.startswith(m[1]) for f in app.env.found_docs) else "",
        text,
        flags=re.M,
    )


SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")


MARKUP = re.compile(r"(?<![\w*])\*\w(?:[^*\n]*\w)?\*(?![\w*])|[*|]|_(?![^\W_])")
"""Emphasis, which stays, or a character that reStructuredText would read as markup."""


def escape(words: str) -> str:
    """Write plain words with `code` and *stress* in them as reStructuredText that reads the same."""
    parts = words.split("`")
    parts[1::2] = (f"``{code}``" for code in parts[1::2])
    parts[::2] = (MARKUP.sub(lambda m: m[0] if len(m[0]) > 1 else "\\" + m[0], plain) for plain in parts[::2])
    return "".join(parts)


def read_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring of this package into reStructuredText: `code`, stars and bars; indented formulas stand by themselves."""
    blocks = re.split(r"\n{2,}", "\n".join(lines).strip("\n"))
    for i, block in enumerate(blocks):
        formula = block.startswith("    ") and not any(above.startswith(SECTIONS) for above in blocks[:i])
        blocks[i] = f"::\n\n{block}" if formula else escape(block)
    lines[:] = [*"\n\n".join(blocks).splitlines(), ""]
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # napoleon would take "type: text" from the first line


def written(obj: Any) -> ast.stmt | None:
    """Give the syntax tree of a class or function, or None if it has no source."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(obj))).body
    except (TypeError, OSError, SyntaxError, ValueError):
        return None
    return tree


def read_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Give a signature as it is written, with its short names of types, and not as Python evaluates it."""
    if inspect.isclass(obj) and dataclasses.is_dataclass(obj):
        fields = {}
        for tree in map(written, reversed(obj.__mro__)):
            lines = tree.body if isinstance(tree, ast.ClassDef) else []
            fields |= {line.target.id: ast.unparse(line) for line in lines if isinstance(line, ast.AnnAssign)}
        given = [field for field in dataclasses.fields(obj) if field.init]
        words = [fields[field.name] for field in sorted(given, key=lambda field: field.kw_only)]
        first = next((i for i, field in enumerate(given) if field.kw_only), None)
        return f"({', '.join(words if first is None else [*words[:first], '*', *words[first:]])})", None
    tree = written(obj.__dict__.get("__init__") if inspect.isclass(obj) else obj)
    if not isinstance(tree, ast.FunctionDef):
        return None
    arguments = tree.args.posonlyargs or tree.args.args
    if arguments and arguments[0].arg in ("self", "cls"):
        del arguments[0]
    back = None if inspect.isclass(obj) or tree.returns is None else ast.unparse(tree.returns).strip("'\"")
    return f"({ast.unparse(tree.args)})", back


def setup(app: Sphinx) -> None:
    """Connect what this file adds to Sphinx."""
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", read_docstring, priority=400)  # before napoleon's
    app.connect("autodoc-process-signature", read_signature)
