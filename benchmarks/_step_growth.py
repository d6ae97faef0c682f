"""How the cost of a step grows with the batch, the resolution and the size of the model."""

from collections.abc import Iterator
from dataclasses import replace

from _step_count import count
from _step_models import Case
from _step_tables import STEPS, Row
from _step_variants import COUNTED, study

BATCHES, RESOLUTIONS = (1, 2, 4, 8, 16), (256, 512, 1024)
SIZES = ((12, 6, 64), (12, 12, 64), (24, 16, 64), (28, 16, 72))
"""DiT-S, B, L and XL: layers, heads, width of a head."""


def growth(case: Case) -> Iterator[Row]:
    """SD1.5 over batches and resolutions, DiT over sizes; nothing for other models."""
    if case.name == "SD1.5":
        for size in BATCHES:
            yield from _point(case, size, axis="batch", title=f"SD1.5 at {case.resolution}")
        for resolution in RESOLUTIONS:
            at = replace(case, resolution=resolution)
            yield from _point(at, 4, axis="resolution in pixels", title="SD1.5, batch 4")
    if case.name == "DiT-XL/2":
        for layers, heads, width in SIZES:
            shape = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": width}
            at = replace(case, config=case.config | shape)
            yield from _point(at, 4, axis="million parameters", title=f"DiT/2 at {case.resolution}, batch 4")


def _point(case: Case, size: int, *, axis: str, title: str) -> Iterator[Row]:
    of = study(case, fake=True)
    given = of.batch(size)
    parameters = round(sum(p.numel() for p in of.model.parameters()) / 1e6)
    at = {"batch": size, "resolution in pixels": case.resolution}.get(axis, parameters)
    added, base = of.parts(given).added, None
    for name in ("MSE", *STEPS):
        counted = count(COUNTED[name](of, given), of.model)
        base = base or counted
        yield {
            "model": case.name, "resolution": case.resolution, "batch": size, "variant": name, "axis": axis, "at": at,
            "title": title, "flops/mse": counted.flops / base.flops, "limit/mse": 1 + added / base.flops,
            "saved/mse": counted.saved / base.saved, "live/mse": counted.live / base.live,
        }  # fmt: skip
