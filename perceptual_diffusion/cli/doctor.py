"""`perceptual-diffusion doctor`: what this machine is, what of the package works on it, and whether its numbers are right.

It needs torch alone. What may crash or hang runs in processes of its own: the imports of optional packages, the self-tests.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from perceptual_diffusion.cli import environment
from perceptual_diffusion.cli.selftest import MARK, Result

PARTS = {
    "diffusers": "models, schedulers and pipelines of diffusers",
    "timm": "networks of timm as teachers",
    "train": "`perceptual-diffusion train`",
    "demo": "`perceptual-diffusion demo`, `inspect`, `sample`, `evaluate`",
    "examples": "the scripts in examples/",
}
"""What the extras for users are for."""

LIMITS = {"import": 120, "device": 240, "compile": 45, "lora": 90}
"""Seconds that a job may take: several times what it takes on an idle machine, but for the compiler."""

NAMED = {"compile": "DiT, compiled", "lora": "DiT, LoRA"}

LEAST_DISK = 2**30

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]

CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from perceptual_diffusion.cli.selftest import main; main(*sys.argv[2:])"
)


def run(*, report: bool, as_json: bool) -> bool:
    """Look at this machine, print what was found, and give whether all self-tests passed.

    Args:
        report: print Markdown, to be pasted into an issue, also on a terminal.
        as_json: print JSON.
    """
    if sys.stderr.isatty():
        print("Looking at this machine. This takes up to a minute ...", file=sys.stderr, flush=True)
    found = facts()
    if as_json:
        print(json.dumps(found, indent=1, allow_nan=False))
    elif report or not sys.stdout.isatty() or not _on_terminal(found):
        text = markdown(found)
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))
    return bool(found["passed"])


def facts() -> dict[str, Any]:
    """Gather what `doctor` says, as it is printed with --json."""
    devices, notes = environment.devices()
    wanted = environment.requirements()
    packages = _packages(wanted)
    names = [device["device"] for device in devices]
    importable = _importable(packages)
    lora = "peft" in importable
    jobs = [("compile", names[-1]), *(("device", name) for name in names), *([("lora", "cpu")] if lora else [])]
    with ThreadPoolExecutor(max(2, min(4, os.cpu_count() or 2))) as pool:
        running = [pool.submit(_test, job, device) for job, device in jobs]
        imports = pool.submit(_imports, [n for n in importable if any(n in wanted[e] for e in PARTS if e in wanted)])
        for name, problem in imports.result().items():
            packages[name]["problem"] = problem
        tests = [result for future in (*running[1:], running[0]) for result in future.result()]
    if not lora:
        tests.append(Result(device="cpu", dtype="float32", case=NAMED["lora"], note="there is no peft that fits"))
    here = environment.machine()
    bad = [f"{name} {package['problem']}" for name, package in packages.items() if "malicious" in package["problem"]]
    notes = [
        *(f"{text}: uninstall it, and change every password and key that this machine knows" for text in bad),
        *notes,
    ]
    disk = environment.disk_usage()
    if disk is not None and disk.free < LEAST_DISK:
        notes.append("less than 1 GiB of disk is free here: a run would not be able to save its state")
    if not wanted:
        notes.append(f"the package is not installed, so its extras are not known: run `pip install {environment.NAME}`")
    found = {
        "machine": here, "devices": devices, "packages": packages, "parts": _parts(wanted, packages),
        "tests": [asdict(test) for test in tests], "notes": notes, "passed": not any(test.problems for test in tests),
    }  # fmt: skip
    return environment.redact(found)  # type: ignore[no-any-return]


# --- packages ---------------------------------------------------------------------------------------------------------


def _packages(wanted: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Version, what is wanted and what is wrong, of each package that an extra for users names or that is installed."""
    asked: dict[str, str] = {}
    for versions in wanted.values():
        for name, spec in versions.items():
            both = [part.strip() for part in f"{asked.get(name, '')},{spec}".split(",") if part.strip()]
            asked[name] = ",".join(dict.fromkeys(both))
    users = {name for extra in ("", *PARTS) for name in wanted.get(extra, {})}
    found: dict[str, dict[str, str]] = {}
    for name in sorted({*users, *environment.BESIDE}):
        version = environment.version_of(name)
        if version or name in users:
            problem = environment.misfit(name, version, asked.get(name, "")) if version else ""
            found[name] = {"version": version or "", "wanted": asked.get(name, ""), "problem": problem}
    return found


def _importable(packages: dict[str, dict[str, str]]) -> list[str]:
    """The packages that are imported to see whether they work: never one with something wrong, which may be malicious."""
    return [name for name, package in packages.items() if package["version"] and not package["problem"]]


def _parts(wanted: dict[str, dict[str, str]], packages: dict[str, dict[str, str]]) -> dict[str, dict[str, Any]]:
    """For each extra: what it is for, what is missing, what is broken, and what mends it."""
    found = {}
    for extra, use in PARTS.items():
        names = wanted.get(extra, {})
        missing = [name for name in names if not packages[name]["version"]]
        old = [name for name in names if environment.misfit(name, packages[name]["version"], names[name])]
        broken = [name for name in names if packages[name]["problem"] and name not in old]
        mends = [environment.pip(extra)] if missing or old else []
        mends += [f"pip install --force-reinstall {' '.join(broken)}"] if broken else []
        found[extra] = {
            "for": use, "works": bool(names) and not (missing or old or broken), "missing": missing, "old": old,
            "broken": broken, "mend": " && ".join(mends),
        }  # fmt: skip
    return found


def _imports(names: Sequence[str]) -> dict[str, str]:
    """What is wrong with packages when they are imported: each after the other, in a process that may end in any of them."""
    found: dict[str, str] = {}
    while left := [name for name in names if name not in found]:
        rows, ended = _child("import", ",".join(left))
        for row in rows:
            found[row["package"]] = f"cannot be imported: {row['error']}" if row["error"] else ""
        stuck = next((name for name in left if name not in found), None)
        if stuck is not None:
            found[stuck] = f"cannot be imported: {ended or 'the process ended'}"
    return found


# --- processes --------------------------------------------------------------------------------------------------------


def _child(job: str, argument: str) -> tuple[list[dict[str, Any]], str]:
    """What a job printed, and how it ended if not well."""
    command = [sys.executable, "-W", "ignore", "-P", "-c", CHILD, json.dumps(sys.path), job, argument]
    settings = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=settings, timeout=LIMITS[job], check=False
        )
        out, said = done.stdout, done.stderr.decode("utf-8", "replace").strip().splitlines()
        ended = (
            f"its process ended with {done.returncode}" + (f": {said[-1]}" if said else "") if done.returncode else ""
        )
    except subprocess.TimeoutExpired as error:
        out, ended = error.stdout or b"", f"it did not end within {LIMITS[job]} s"
    except OSError as error:
        out, ended = b"", f"its process cannot be started: {error.strerror}"
    lines = out.decode("utf-8", "replace").splitlines()
    return [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)], ended


def _test(job: str, device: str) -> list[Result]:
    """The results of a self-test; that of a process which ended early is a failure, of the optional ones a note."""
    rows, ended = _child(job, device)
    results = [Result(**row) for row in rows]
    if job == "device" and (ended or not results):
        results.append(Result(device=device, dtype="-", case="the others", problems=[ended or "it printed nothing"]))
    elif ended and not results:
        results.append(Result(device=device, dtype="float32", case=NAMED[job], note=ended))
    return results


# --- printing ---------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[Table]:
    """Give (title, head, rows) of what is printed."""
    here = dict(found["machine"])
    variables = here.pop("variables")
    here["variables"] = ", ".join(f"{name}={value}" for name, value in variables.items()) or "none of those that matter"
    rows = [(test, _verdict(test)) for test in found["tests"]]
    return [
        ("This machine", ("", ""), list(here.items())),
        ("Devices", ("device", "is", "memory"), [tuple(device.values()) for device in found["devices"]]),
        (
            "Packages", ("package", "version", "expected", ""),
            [(name, p["version"] or "-", p["wanted"] or "any", p["problem"] or ("" if p["version"] else "not installed"))
             for name, p in found["packages"].items()],
        ),
        (
            "Parts", ("extra", "for", "state", "what to do"),
            [(extra, part["for"], _state(part), part["mend"]) for extra, part in found["parts"].items()],
        ),
        (
            "Self-test", ("device", "dtype", "case", "loss off by", "gradient off by", "bound", "result"),
            [(test["device"], test["dtype"], test["case"], *map(_number, (test["loss_error"], test["gradient_error"], test["bound"])), said)
             for test, said in rows],
        ),
    ]  # fmt: skip


def verdict(found: dict[str, Any]) -> list[str]:
    """Give the closing sentences: the notes, and what follows from the self-tests."""
    failed = [test for test in found["tests"] if test["problems"]]
    ran = [test for test in found["tests"] if test["problems"] or test["loss_error"] is not None]
    if not failed:
        return [*found["notes"], f"All {len(ran)} self-tests passed."]
    where = sorted({f"{test['device']}, {test['dtype']}, {test['case']}" for test in failed})
    return [
        *found["notes"],
        f"{len(failed)} of {len(ran)} self-tests failed ({'; '.join(where)}). Do not train so on this machine. Install torch "
        "again for its devices and run this once more; if it still fails, open an issue with the output of "
        "`perceptual-diffusion doctor --report`.",
    ]


def _state(part: dict[str, Any]) -> str:
    said = [f"{word}: {', '.join(part[word])}" for word in ("missing", "old", "broken") if part[word]]
    return "; ".join(said) or ("works" if part["works"] else "unknown")


def _verdict(test: dict[str, Any]) -> str:
    if test["problems"]:
        return f"FAILED: {'; '.join(test['problems'])}"
    if test["loss_error"] is None:
        return f"not tested: {test['note']}"
    return f"right; {test['note']}" if test["note"] else "right"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def markdown(found: dict[str, Any]) -> str:
    """Give the report as Markdown."""
    parts = []
    for title, head, rows in tables(found):
        lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in (head, *rows)]
        parts.append("\n".join([f"### {title}", "", lines[0], "|" + " --- |" * len(head), *lines[1:]]))
    parts.append("\n".join(f"- {sentence}" for sentence in verdict(found)))
    return "\n\n".join(parts)


def _on_terminal(found: dict[str, Any]) -> bool:
    """Print with rich, and give whether that could be done."""
    try:
        from rich.console import Console
        from rich.table import Table as Rich
        from rich.text import Text

        console = Console(highlight=False, markup=False, emoji=False)
        for title, head, rows in tables(found):
            table = Rich(*head, title=title, title_justify="left", box=None, show_header=any(head))
            for row in rows:
                table.add_row(*(Text(cell, "bold red" if cell.startswith("FAILED") else "") for cell in row))
            console.print(table)
            console.print()
        for sentence in verdict(found):
            console.print(sentence)
    except Exception:  # rich is missing or damaged
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `doctor` without what the other commands need."""
    parser = argparse.ArgumentParser(prog="perceptual-diffusion doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--report", action="store_true", help="Print Markdown to paste into an issue.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    given = parser.parse_args(arguments)
    try:
        sys.exit(0 if run(report=given.report, as_json=given.json) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
