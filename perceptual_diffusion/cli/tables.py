"""What `inspect` found, as tables."""

from typing import Any


def show(facts: dict[str, Any]) -> None:
    """Print the facts of `inspect`."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 140
    family = facts["family"] or "unknown family"
    console.print(f"[bold]{facts['class']}[/], {_count(facts['parameters'])} parameters ({escape(family)})")
    console.print(escape(f"sample {_shape(facts['sample']['clean'])}{_made(facts['sample'])}"), soft_wrap=True)
    table = Table("block", "class", "gives", "parameters", "FLOPs", "until here", box=None, header_style="bold")
    for column in table.columns[3:]:
        column.justify = "right"
    for block in facts["blocks"]:
        tapped = block["name"] in facts["layers"]
        shapes = " and ".join(_shape(shape) for shape in block["shapes"]) or "-"
        shares = (_percent(block[key]) for key in ("parameters_share", "flops_share", "flops_until"))
        style = "bold green" if tapped else None if block["noisy"] else "dim"
        mark = " <-" if tapped else ""
        table.add_row(escape(block["name"]) + mark, block["kind"], escape(shapes), *shares, style=style)
    console.print(table)
    if any(block["noisy"] is False for block in facts["blocks"]):
        console.print("[dim]Dim blocks do not depend on the noisy sample.[/]")
    for line in (*_middle(facts), *_process(facts["process"]), *_cost(facts)):
        console.print(escape(line), soft_wrap=True)
    if "probe" in facts:
        console.print()
        console.print(escape(facts["probe"]["table"]), soft_wrap=True)
        console.print(escape(f"most structure, least noise: {', '.join(facts['probe']['ranking'][:5])}"))
        if facts["probe"]["note"]:
            console.print(escape(facts["probe"]["note"]))


def _middle(facts: dict[str, Any]) -> list[str]:
    middle = facts["middle"]
    if facts["layers"] and facts["layers"] != middle["layers"]:
        return [f"layers: {', '.join(facts['layers'])}, as given"]
    if middle["error"]:
        return [f"middle: not found. {middle['error']}"]
    sure = "" if middle["sure"] else "; not sure, check it"
    return [f"middle: {', '.join(middle['layers'])} ({middle['why']}{sure})"]


def _process(process: dict[str, Any]) -> list[str]:
    if process["error"]:
        return [f"schedule: {process['scheduler'] or 'given'}, but: {process['error']}"]
    if process["schedule"] is None:
        return [
            "schedule: none found. Training needs a diffusers scheduler or a schedule of perceptual_diffusion.schedules."
        ]
    read = f" (read from {process['scheduler']})" if process["scheduler"] else ""
    return [f"schedule: {process['schedule']}{read}, prediction: {process['prediction']}"]


def _cost(facts: dict[str, Any]) -> list[str]:
    cost = facts["cost"]
    if cost is None:
        return ["cost: not counted, since the layers are not known. Give --layers."]
    share = cost["to_layers"] / max(1, cost["forward"])
    added = 2 * cost["to_layers"] + cost["to_input"]
    how = "" if cost["counted"] else " (the backward could not be run: it is taken for twice the forward)"
    return [
        f"forward: {_flops(cost['forward'])}, of which {_percent(share)} up to the layers compared",
        f"a step: MSE {_flops(cost['mse'])}, with the objective {_flops(cost['mse'] + added)}, {cost['ratio']:.2f} times{how}",
        f"the teacher holds {_count(cost['held'])} parameters, {_percent(cost['held_share'])} of the model's",
    ]


def _made(sample: dict[str, Any]) -> str:
    cond = ", ".join(f"{name} {_shape(value)}" for name, value in sample["cond"].items())
    return f"{', ' if cond else ''}{cond}{'; made up from the config' if sample['made up'] else ''}"


def _shape(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, list) and value and all(isinstance(n, int) for n in value):
        return " x ".join(map(str, value))
    if isinstance(value, list):
        return f"[{', '.join(_shape(item) for item in value[:2])}{', ...' if len(value) > 2 else ''}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_shape(item)}" for key, item in value.items()) + "}"
    return str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _count(number: int) -> str:
    for size, word in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.3g}{word}"
    return str(number)


def _flops(number: int) -> str:
    for size, word in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g} {word}FLOP"
    return f"{number} FLOP"
