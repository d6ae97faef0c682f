"""Count, over the rows of the tests' zoo, what finding the noisy sample's part of the middle's output takes.

Run from the project's root: `python benchmarks/noisy_parts.py`. It prints one JSON object.
"""

import json
import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
warnings.simplefilter("ignore")

import torch  # noqa: E402
from zoo import ROWS, build  # noqa: E402

from perceptual_diffusion import PAPER, SelfPerceptualObjective, adapters  # noqa: E402


def parts(name: str, separate: bool) -> list[tuple]:
    """What is found in the middle of a row's model, with tokens kept apart from each other or not."""
    model, tiny = build(name)
    several = isinstance(adapters.find(model).prediction, tuple)
    latents = tiny.prediction != "sample" or not several
    objective = SelfPerceptualObjective.wrap(
        model,
        tiny.scheduler(),
        prediction=tiny.prediction if several else None,
        t_range=None if latents else (1, 1000),
        **PAPER,
    )
    objective.teacher.features = "noisy" if separate else "all"  # "all" leaves the attention as it is
    with torch.no_grad():
        objective.teacher(tiny.clean, objective.schedule.at(torch.full((len(tiny.t),), 0.5)), tiny.cond)
    found = next(iter(objective.teacher._parts.values()), [])
    return [(p.stream, p.batch, p.tokens, tuple(map(len, p.picked))) for layer in found for p in layer]


def main() -> None:
    """Print the counts."""
    counts: Counter[str] = Counter(rows=len(ROWS))
    for name in ROWS:
        found = parts(name, separate=True)
        try:
            mixed = parts(name, separate=False)
        except ValueError:  # samples that cannot be told apart
            mixed = []
        counts["declared"] += not found
        counts["a stream of several"] += any(stream for stream, *_ in found)
        counts["some of the tokens"] += any(tokens is not None for _, _, tokens, _ in found)
        counts["tokens that differ by sample"] += any(len(picked) > 1 for *_, picked in found)
        counts["batch not first"] += any(batch for _, batch, *_ in found)
        counts["wrong where tokens mix"] += bool(found) and found != mixed
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
