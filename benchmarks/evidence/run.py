"""Does the objective help? Train bases, fine-tune them by recipes, sample, measure.

    python benchmarks/evidence/run.py base fashion-unet        # train a base; resumable, on a new machine with --restart
    python benchmarks/evidence/run.py table 1                  # make what the paper's table 1 needs, seeds 0 to 2; resumable
    python benchmarks/evidence/run.py error fashion-unet       # what real pictures get, by chance

What is done is skipped. Weights of fine-tuned models, and some of their samples, lie under `runs/evidence`, bases in `benchmarks/evidence/bases`, rows in
`benchmarks/evidence/results.json`; `python benchmarks/evidence/render.py` makes the tables and figures of the docs from them.
"""

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import _audio
import _bases
import _rows
import _video
import torch
from _bases import FOLDER, Base
from _plan import RECIPES, SEARCH_SEEDS, SEARCHED, SEEDS, TABLES, Falling, Recipe, Sampling
from _sampling import sample
from torch import Tensor, nn
from tqdm import tqdm

from perceptual_diffusion import PAPER
from perceptual_diffusion.cli._errors import UserError
from perceptual_diffusion.cli.files import check_key, load_state, save_state, write
from perceptual_diffusion.cli.training import FineTuning, Interrupted, Stop

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs/evidence"
BASES = _bases.BASES | {base.name: base for base in (_audio.BASE, _video.BASE)}


class Budget(Stop):
    """Stops when asked to, or when the time is up."""

    def __init__(self, minutes: float) -> None:
        timer = threading.Timer(60 * minutes, self._up)
        timer.daemon = True
        timer.start()

    def _up(self) -> None:
        self.asked = True


def hardware(device: str) -> str:
    """Name the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = (
        [x.partition(": ")[2] for x in info.read_text().splitlines() if x.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} thread"


def tuning(
    base: Base,
    model: nn.Module,
    recipe: Recipe,
    seed: int,
    device: str,
    *,
    teacher: nn.Module | None = None,
    **changed: Any,
) -> FineTuning:
    """Set up the training of a model, with another teacher than its copy if one is given."""
    given: dict[str, Any] = {
        "batch": base.batch, "lr": recipe.lr, "decay": 0.995, "clip": math.inf, "factor": lambda step: min(1.0, (step + 1) / 50)
    }  # fmt: skip
    return base.tuning(
        model.to(device), base.scheduler(), base.train, loss=recipe.loss or "mse", seed=seed, drop=base.drop,
        own_average=recipe.teacher == "ema", options=PAPER | recipe.options | ({"teacher": teacher} if teacher else {}),
        **given | changed,
    )  # fmt: skip


def train_base(base: Base, device: str, stop: Budget, every: int, n: int = 1000, restart: bool = False) -> None:
    """Train a base from scratch; every so many steps `n` of its samples are measured, and its weights written.

    Args:
        base: the base.
        device: where.
        stop: asked between steps.
        every: steps between two measurements.
        n: how many samples are measured.
        restart: where the state is not here, go on from the averaged weights that the repository holds, with a new optimizer, and other
            draws; the learning rate rises over 500 steps to where it was. The log says so in "restarts", and what made the steps before.

    Raises:
        UserError: the repository holds weights, and what it takes to go on from them is not here.
    """
    if isinstance(base, _bases.Packaged):
        raise UserError(f"{base.name!r} is the base of the package. Train it by `examples/train_base.py`.")
    state, log = RUNS / f"{base.name}.safetensors", FOLDER / f"{base.name}.json"
    about = json.loads(log.read_text()) if log.exists() else {"log": []}
    if base.trained and not state.exists():
        on = "" if base.trained >= base.steps else "pass --restart to go on from the weights, "
        if not (restart and on):
            raise UserError(
                f"{base.name!r} has been trained for {base.trained} steps, and its state {str(state)!r} is not here. "
                f"Bring it, {on}or delete {str(FOLDER / base.name)!r}.* to train it anew."
            )
        made_by = {name: about[name] for name in ("torch", "command", "commit", "hardware", "date")}
        if base.trained not in [row["step"] for row in about.setdefault("restarts", [])]:
            about["restarts"].append({"step": base.trained, "before": made_by})
            write(log, json.dumps(about, indent=1) + "\n")
    start = about["restarts"][-1]["step"] if about.get("restarts") else 0
    recipe, model = Recipe(loss="mse", lr=base.lr), base.read() if start else base.build()
    factor = partial(base.factor, start=start)
    # fine-tunings draw by whole thousands
    run = tuning(base, model, recipe, start and start + 1, device, decay=base.decay, factor=factor, clip=1.0)
    key = {"base": base.name, "batch": base.batch, "lr": base.lr, "decay": base.decay, "drop": base.drop}
    of = key | ({"start": start} if start else {})
    meta = load_state(state)[1] if state.exists() else None
    if meta is not None:
        check_key(f"the state {str(state)!r}", meta.get("key"), of)
    done = start + (meta["done"] if meta is not None else 0)
    measured = {row["step"] for row in about["log"]}
    flops, progress = run.count_flops(), _progress(base.steps - start, base.name)
    for step in range(every, base.steps + 1, every):
        if step < done or step in measured:
            continue
        model = run.run(step - start, state=state, stop=stop, key=of, every=250, progress=progress)
        found = base.measure(*draw(base, model, Sampling(), seed=0, n=n, device=device), device)
        weights = {k: v.half() for k, v in model.state_dict().items()}
        save_state(FOLDER / f"{base.name}.safetensors", weights, {"base": base.name, "step": step})
        recent = [row["mse"] for row in run.history[-every:]]
        loss = sum(recent) / len(recent)
        about |= key | {
            "steps": step, "compute": flops * step, "loss": loss, "torch": torch.__version__, **where(device)
        }  # fmt: skip
        about["log"].append({"step": step, "n": n, "loss": loss, **found})
        write(log, json.dumps(about, indent=1) + "\n")
        print(step, found, flush=True)


def _progress(steps: int, name: str) -> Callable[[int, dict[str, float]], None]:
    bar = tqdm(total=steps, desc=name, mininterval=10)

    def show(step: int, row: dict[str, float]) -> None:
        bar.set_postfix(row, refresh=False)
        bar.update(step - bar.n)

    return show


def fine_tuned(base: Base, name: str, seed: int, device: str, stop: Budget) -> nn.Module:
    """Give the base fine-tuned by a recipe; train it, or go on with it, if that is not done yet."""
    model, recipe = base.read(), RECIPES[name]
    if recipe.loss is None:
        return model.to(device).eval()
    teacher = fine_tuned(base, "sp", seed, device, stop) if recipe.teacher == "sp" else None
    run = tuning(
        base, model, recipe, 1000 * (seed + 1), device, teacher=teacher
    )  # other draws than the base's training
    steps = steps_of(base, recipe, run, device)
    if isinstance(recipe, Falling):
        rise = run.factor
        run.factor = lambda step: min(rise(step), 1 - step / steps)
    of = repr(RECIPES["sp"]) if teacher else None
    key = {
        "base": base.name,
        "base_steps": base.trained,
        "recipe": repr(recipe),
        "teacher": of,
        "steps": steps,
        "seed": seed,
    }
    state = RUNS / f"{base.name}, {name}, {seed}, {sha256(json.dumps(key).encode()).hexdigest()[:8]}.safetensors"
    progress = _progress(steps, f"{name}, seed {seed}")
    return run.run(steps, state=state, stop=stop, key=key, every=250, progress=progress)


def steps_of(base: Base, recipe: Recipe, run: FineTuning, device: str) -> int:
    """How many steps a recipe takes."""
    if recipe.as_much_as is None:
        return recipe.steps
    other = RECIPES[recipe.as_much_as]
    spent = tuning(base, base.read(), other, 0, device).count_flops() * other.steps
    return round(spent / run.count_flops())


def draw(
    base: Base, model: nn.Module, how: Sampling, *, seed: int, n: int, device: str
) -> tuple[Tensor, Tensor | None]:
    """Sample a model: what is measured, and the classes asked for, if any. A seed gives the same noise to every model."""
    noise = torch.randn(n, *base.shape, generator=torch.Generator().manual_seed(10_000 + seed)).to(device)
    asked = base.classes(n)
    labels = asked if base.conditional else torch.full_like(asked, base.null)
    made = sample(
        model, base.scheduler(), noise, labels.to(device), steps=how.steps, null=base.null, guidance=how.guidance,
        rescale=how.rescale, batch=base.at_once * (1 if device == "cpu" else 20),
    )  # fmt: skip
    return base.finish(made.cpu()), asked if base.conditional else None


def make_rows(table: str, base: Base, name: str, how: Sampling, seed: int, n: int, device: str, stop: Budget) -> None:
    """Make the rows of one recipe, one seed and one way to sample, unless they are there."""
    recipe = RECIPES[name]
    # to count; another teacher of the same kind costs the same
    run = tuning(base, base.read(), recipe, seed, "cpu") if recipe.loss else None
    given = {"layers": _layers(run), **PAPER, "formulation": "joint", "weight": None}
    ours = recipe.loss == "self-perceptual"
    about = {
        "table": table, "dataset": base.dataset, "base": base.name, "base_steps": base.trained,
        "model": "conditional" if base.conditional else "unconditional", "loss": name,
        "guidance": how.guidance if how.guidance != 1 else "none", "rescale": how.rescale,
        "nfe": how.steps * (2 if how.guidance != 1 else 1), "seed": seed, "n": n,
        **(given | recipe.options | {"layers": given["layers"]} if ours else dict.fromkeys(given)), "teacher": recipe.teacher if ours else None,
        "lr": recipe.lr if run else None, "steps": steps_of(base, recipe, run, "cpu") if run else 0,
    }  # fmt: skip
    if about["t_prime"] is not None:
        about["t_prime"] = str(about["t_prime"])
    wanted = {k: v for k, v in about.items() if k != "table"}
    same = [row for row in _rows.read() if all(row[k] == v for k, v in wanted.items())]
    if same:  # of another table, or of this one
        _rows.add([row | {"table": table} for row in same])
        return
    made, labels = draw(base, fine_tuned(base, name, seed, device, stop), how, seed=seed, n=n, device=device)
    base.show(made, base.classes(n), shown(base, name, how, seed))
    found = base.measure(made, labels, device)
    about |= {"compute": run.count_flops() * about["steps"] if run else 0, **where(device)}
    _rows.add([about | {"metric": metric, "value": value} for metric, value in found.items()])
    print(json.dumps(about | found), flush=True)


def shown(base: Base, name: str, how: Sampling, seed: int) -> Path:
    """Where some of the samples are put, without the suffix."""
    return (
        RUNS
        / f"{base.name}, {name}, {how.steps} steps, guidance {how.guidance} {how.rescale}, seed {seed}, base {base.trained}"
    )


def _layers(run: FineTuning | None) -> str | None:
    return ", ".join(run.objective.teacher.layers) if run else None


def make_references(base: Base, seed: int, device: str) -> None:
    """Make the rows that say what real data get."""
    for name, (n, found) in base.references(device, seed).items():
        about = dict.fromkeys(_rows.COLUMNS) | {
            "table": "error", "dataset": base.dataset, "base": base.name, "model": name, "guidance": "none", "rescale": 0.0, "nfe": 0,
            "seed": seed, "n": n, "steps": 0, "base_steps": 0, "compute": 0, **where(device),
        }  # fmt: skip
        _rows.add([about | {"metric": metric, "value": value} for metric, value in found.items()])


@cache
def commit() -> str:
    """The commit of the code that runs: asked once, at the start, since the next commit may come before the rows."""
    code = ("--", "perceptual_diffusion", "benchmarks/evidence/*.py")
    return _git("rev-parse", "--short", "HEAD") + (" and changes" if _git("status", "--porcelain", *code) else "")


def where(device: str) -> dict[str, str]:
    """What was typed, on what, and when."""
    command = shlex.join(["python", "benchmarks/evidence/run.py", *sys.argv[1:]])
    return {
        "command": command,
        "commit": commit(),
        "hardware": hardware(device),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Do one of the things that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("base", "table", "error"))
    parser.add_argument("name", help=f"a base ({', '.join(BASES)}), or a table ({', '.join(TABLES)})")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--seed",
        type=int,
        action="append",
        help=f"may be repeated; default: {SEEDS}, of the search and of longer training {SEARCH_SEEDS}",
    )
    parser.add_argument("--only", action="append", help="only this recipe; may be repeated")
    parser.add_argument("--ways", type=int, help="only so many of the table's ways to sample; default: all")
    parser.add_argument("--n", type=int, help="samples; default: as the plan and the base say")
    parser.add_argument("--every", type=int, default=1000, help="of a base: steps between two measurements")
    parser.add_argument(
        "--restart", action="store_true", help="of a base: go on from its weights where its state is not"
    )
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after this time, to be gone on with later")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    known = TABLES if options.what == "table" else BASES
    if options.name not in known:
        parser.error(f"unknown name {options.name!r}, expected one of {', '.join(known)}.")
    commit()
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    stop = Budget(options.minutes)
    try:
        with stop.listening():
            if options.what == "base":
                train_base(BASES[options.name], options.device, stop, options.every, restart=options.restart)
            elif options.what == "error":
                for seed in options.seed or SEEDS:
                    make_references(BASES[options.name], seed, options.device)
            else:
                for seed in options.seed or (SEARCH_SEEDS if options.name in SEARCHED else SEEDS):
                    for base, name, ways in TABLES[options.name]:
                        for how in ways[: options.ways] if not options.only or name in options.only else ():
                            n = options.n or min(how.n or BASES[base].n, BASES[base].n)
                            make_rows(options.name, BASES[base], name, how, seed, n, options.device, stop)
                            stop.check()
    except Interrupted:
        print("stopped; the same command goes on")
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
