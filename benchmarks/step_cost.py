"""Count and time one step of training: MSE, Algorithm 1 as printed, the objective in its modes, and what there is instead.

Run from the project's root: `python benchmarks/step_cost.py`. It takes about an hour on one core, writes
`benchmarks/results/step_cost.json`, and from that the tables of `docs/cost.md` and its figure. Parts, models and rounds can
be chosen; what is not run anew stays as it was. `--render` runs nothing.
"""

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")

import torch  # noqa: E402
from _step_count import Count, Step, count, seconds  # noqa: E402
from _step_growth import growth  # noqa: E402
from _step_ideas import ideas  # noqa: E402
from _step_models import CASES, TINY, Case  # noqa: E402
from _step_outside import outside  # noqa: E402
from _step_tables import STEPS, Row, figure, fill  # noqa: E402
from _step_variants import COUNTED, LORA_COUNTED, WALL, Study, memory, study  # noqa: E402

from perceptual_diffusion.inspection.memory import weights_held  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/step_cost.json"
DOCUMENT, IMAGE = ROOT / "docs/cost.md", ROOT / "docs/images/step_cost.png"

IN_EVERY_MODE = "SD2.1"
AT_ONE = ("MSE", "plain autograd", "micro-batches of 1")


def row(study: Study, step: Step, counted: Count, base: Count, added: int, *, batch: int, **more: object) -> Row:
    """One line of the results: a step next to the MSE step and to the limit."""
    held, size = weights_held(step.held, beside=[study.model])
    parameters, model_bytes = weights_held([study.model])
    limit = base.flops + added
    return {
        "model": study.case.name, "resolution": study.case.resolution, "batch": batch, **more,
        "flops": counted.flops, "flops/mse": counted.flops / base.flops, "flops/limit": counted.flops / limit,
        "limit/mse": limit / base.flops, "saved": counted.saved, "saved/mse": counted.saved / base.saved,
        "live": counted.live, "live/mse": counted.live / base.live, "weights": held, "weights_bytes": size,
        "weights_share": held / parameters, "model_bytes": model_bytes,
    }  # fmt: skip


def count_case(case: Case) -> Iterator[Row]:
    """A published model at batch 8 and at batch 1, one of them in every mode and under LoRA training; nothing is run."""
    plain = study(case, fake=True)  # the limit's passes are the base's
    for size, lora in ((8, False), (1, False), (8, True)):
        if lora and case.name != IN_EVERY_MODE:
            continue
        of = study(case, fake=True, lora=True) if lora else plain
        given, others = of.batch(size), outside(of) if size > 1 and not lora else {}
        names = AT_ONE if size == 1 else COUNTED if case.name == IN_EVERY_MODE else ("MSE", *STEPS)
        added, base = plain.parts(given).added, None
        for name, variant in (LORA_COUNTED if lora else {n: COUNTED[n] for n in names} | others).items():
            step = variant(of, given)
            counted = count(step, of.model)
            base = base or counted
            more = {"variant": name, "lora": lora, "outside": name in others}
            yield row(of, step, counted, base, added, batch=size, **more)


def time_case(case: Case, rounds: int, seed: int) -> Iterator[Row]:
    """A small model, run: every round takes all steps in an order of its own."""
    of, size = study(case, fake=False), 8
    given = of.batch(size)
    added = of.parts(given).added
    steps = {name: variant(of, given) for name, variant in WALL.items()}
    counts = {name: count(step, of.model) for name, step in steps.items() if name in COUNTED}  # not what is compiled
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(seed)
    for _ in range(rounds + 1):
        for name in order.sample(list(steps), len(steps)):
            times[name].append(seconds(steps[name]))
    for name, step in steps.items():
        ratios = [a / b for a, b in zip(times[name][1:], times["MSE"][1:], strict=True)]  # the first round warms up
        low, middle, high = statistics.quantiles(ratios, n=4)
        more = {"variant": name, "wall/mse": middle, "quartiles": [low, high], "rounds": rounds}
        more["seconds"] = statistics.median(times[name][1:])
        if name in counts:
            yield row(of, step, counts[name], counts["MSE"], added, batch=size, **more)
        else:
            base = {"model": case.name, "resolution": case.resolution, "batch": size}
            yield base | more | {"limit/mse": 1 + added / counts["MSE"].flops}


def provenance(seed: int) -> Row:
    """Where and by what rows were made."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    cpu = Path("/proc/cpuinfo")
    names = (
        [line.partition(": ")[2] for line in cpu.read_text().splitlines() if line.startswith("model name")]
        if cpu.exists()
        else []
    )
    return {
        "command": shlex.join(["python", "benchmarks/step_cost.py", *sys.argv[1:]]),
        "commit": git("rev-parse", "--short", "HEAD") + (" and changes" if git("status", "--porcelain") else ""),
        "hardware": f"{names[0] if names else platform.processor() or platform.machine()}, one thread, no GPU",
        "torch": torch.__version__, "diffusers": version("diffusers"), "seed": seed,
    }  # fmt: skip


def merge(results: Row, key: str, made: Row, rows: list[Row]) -> Row:
    """Put the rows of a run in the place of older ones of the same part and model."""
    new = {(r["part"], r["model"]) for r in rows}
    kept = [r for r in results["rows"] if (r["part"], r["model"]) not in new] + [{**r, "run": key} for r in rows]
    order = {case.name: place for place, case in enumerate(CASES + TINY)}
    kept.sort(key=lambda r: (r["part"], order[r["model"]]))
    runs = results["runs"] | {key: made}
    return {"runs": {k: v for k, v in runs.items() if k in {r["run"] for r in kept}}, "rows": kept}


def read() -> Row:
    """Read the results there are."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}, "rows": []}


def write(results: Row) -> None:
    """Write the results, a row a line."""
    rows = ",\n".join(f"  {json.dumps(_rounded(r))}" for r in results["rows"])
    RESULTS.write_text(f'{{"runs": {json.dumps(results["runs"], indent=1)},\n"rows": [\n{rows}\n]}}\n')


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def render() -> None:
    """Make the tables and the figure of the docs from the results."""
    rows = read()["rows"]
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), rows))
    figure(rows, IMAGE)


def main() -> None:
    """Run the parts asked for, and write what they gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("counted", "wall", "growth", "ideas")
    parser.add_argument("--part", action="append", choices=parts, help="only this; may be repeated")
    parser.add_argument("--only", action="append", help="only this model; may be repeated")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--render", action="store_true", help="only make the tables and the figure anew")
    args = parser.parse_args()
    torch.set_num_threads(1)
    makers = {
        "counted": (CASES, count_case),
        "wall": (TINY, lambda case: time_case(case, args.rounds, args.seed)),
        "growth": (CASES, growth),
        "ideas": (CASES + TINY, ideas),
    }
    key, made = datetime.now(UTC).isoformat(timespec="seconds"), provenance(args.seed)
    for part in () if args.render else args.part or parts:
        cases, make = makers[part]
        for case in cases:
            if args.only and case.name not in args.only:
                continue
            start, rows = time.process_time(), []
            torch.manual_seed(args.seed)
            with memory(80 * 2**30):
                for made_row in make(case):
                    rows.append({"part": part} | made_row)
                    shown = {k: v for k, v in made_row.items() if "/mse" in k or k in ("variant", "batch", "at")}
                    print(case.name, json.dumps(_rounded(shown)), f"{time.process_time() - start:.0f} s", flush=True)
            if rows:
                write(merge(read(), key, made, rows))
    render()


if __name__ == "__main__":
    main()
