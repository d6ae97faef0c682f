"""Print docs/adapters.md from the adapters' own table of diffusers' denoisers, and from the rows of the tests' zoo.

Run from the project's root: `python tools/adapters_table.py > docs/adapters.md`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from zoo import NO_CPU_BACKWARD, ROWS  # noqa: E402

from perceptual_diffusion.adapters.diffusers import FAMILIES, Family  # noqa: E402

TIMES = {
    "schedule": "the scheduler's",
    "timestep": "0 … 1000",
    "unit": "0 … 1",
    "reversed timestep": "1000 … 0",
    "reversed unit": "1 … 0",
}
PREDICTIONS = {"flow_prediction": "ε − x_0", "-flow_prediction": "x_0 − ε", "sample": "x_0"}


def middle(path: str) -> str:
    """The middle in words."""
    if path.endswith("-1"):
        return f"last of `{path.removesuffix('.-1').removesuffix('.-1')}`"
    if "+" in path:
        return "half-way along " + " then ".join(f"`{name}`" for name in path.split("+"))
    if "&" in path:
        return "half-way along " + " and ".join(f"`{name}`" for name in path.split("&")) + " in turn"
    return f"`{path}`" if "mid" in path else f"half-way along `{path}`"


def prediction(family: Family) -> str:
    """What a flow-matching model of the class predicts."""
    if family.prediction is None:
        return "the scheduler says"
    if isinstance(family.prediction, tuple):
        return " or ".join(PREDICTIONS[kind] for kind in family.prediction) + ", to be passed"
    return PREDICTIONS[family.prediction]


def tested(name: str) -> str:
    """The rows of the class in the zoo."""
    rows = [row.partition(".")[2] or "plain" for row in ROWS if row.split(".")[0] == name]
    where = "on a GPU: " if name in NO_CPU_BACKWARD else ""
    return where + ", ".join(rows)


def joined(family: Family) -> str:
    """Where a clean condition is joined."""
    return f"dim {family.concat}, {'before' if family.first else 'behind'}"


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |\n"


def page() -> str:
    """All of docs/adapters.md."""
    head = (ROOT / "tools" / "adapters_head.md").read_text(encoding="utf-8")
    known = {name: family for name, family in FAMILIES.items() if not family.refused}
    rows = [
        row(
            f"`{name}`", family.modality, ", ".join(f"`{argument}`" for argument in family.noisy), middle(family.middle),
            TIMES[family.time], prediction(family), joined(family),
            "FlexAttention: no backward on a CPU" if family.flex else family.note, tested(name),
        )
        for name, family in known.items()
    ]  # fmt: skip
    columns = (
        "class",
        "makes",
        "denoises",
        "middle",
        "its time, clean … noise",
        "predicts",
        "`concat`",
        "note",
        "tested",
    )
    refused = [row(f"`{name}`", family.refused) for name, family in FAMILIES.items() if family.refused]
    return "".join(
        [
            head, row(*columns), row(*["---"] * len(columns)), *rows, "\n## Refused\n\n", row("class", "why"),
            row("---", "---"), *refused,
        ]
    )  # fmt: skip


if __name__ == "__main__":
    print(page(), end="")
