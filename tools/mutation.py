"""Measure how many small faults in the mathematics of the core its tests find.

    python tools/mutation.py [--every N] [--cases N] [--jobs N] [--report FILE] [MODULE ...]

mutmut makes the faults ("mutants"): another operator, number, argument, word. The tests are collected once, and every
mutant is tried in a fork of that process, cheapest test first, until one fails. What survives and was also called while the
tests were collected is tried again in a new process. Needs `pip install 'mutmut>=3.8,<4'`.
"""

import argparse
import ast
import difflib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("schedules", "parameterizations", "timesteps", "distances", "objective")
ALSO = {"objective": ("tests/test_nonfinite.py",)}  # beside the file of the module's name
LEAST = 90.0
CHEAP = 0.05  # seconds
ACTIVE = "MUTANT_UNDER_TEST"  # mutmut's functions read it at every call
QUICK = ("-q", "-p", "no:cacheprovider", "--tb=native", "--assert=plain")
FAULT = 3
ENDED = {0: "survived", 1: "killed", -signal.SIGSEGV: "killed", -signal.SIGABRT: "killed"}
ENDED |= dict.fromkeys((-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM), "timeout")
"""How the process of a mutant may end. The kernel kills at the hard limit."""
PROPERTY = re.compile(r"^( +)@property\n +def (\w+)\(self\)( -> .+):\n", re.MULTILINE)


def mutated(source):
    """Give a module with all its mutants, and their names. Properties become methods first: mutmut leaves them out."""
    from mutmut.mutation.file_mutation import mutate_file_contents

    source = PROPERTY.sub(r"\1@property\n\1def \2(self)\3:\n\1    return self._\2_()\n\n\1def _\2_(self)\3:\n", source)
    made = mutate_file_contents("module.py", source)
    return made.code, list(made.mutant_names)


def tree(folder, modules):
    """Lay out a copy of the package whose modules hold their mutants; give the names of the mutants by module."""
    package = folder / "perceptual_diffusion"
    shutil.copytree(ROOT / package.name, package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (package / "assets").symlink_to(ROOT / package.name / "assets")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "setup.cfg").write_text("[mutmut]\nsource_paths = perceptual_diffusion\n", encoding="utf-8")
    os.chdir(folder)
    names = {}
    for module in modules:
        path = package / f"{module}.py"
        code, found = mutated(path.read_text(encoding="utf-8"))
        path.write_text(code, encoding="utf-8")
        names[module] = [f"perceptual_diffusion.{module}.{name}" for name in found]
    return names


def files_of(module):
    """Give the files that hold a module's tests."""
    return (f"tests/test_{module}.py", *ALSO.get(module, ()))


def function_of(mutant):
    """Give the name under which the calls of a mutant's function are recorded."""
    return mutant.partition("__mutmut_")[0]


class Mutation:
    """A pytest plugin that runs the tests on every mutant instead of once."""

    def __init__(self, names, jobs, cases):
        from mutmut.mutation import trampoline

        self.names, self.jobs, self.cases = names, jobs, cases
        self.called = set()
        trampoline.record_trampoline_hit = lambda name, caller=None: self.called.add(name)
        self.results = {}

    def pytest_collection(self, session):
        """Find failures without shrinking them, and record what is called before any test."""
        from hypothesis import Phase, settings

        settings.register_profile("mutation", settings.default, phases=[Phase.explicit, Phase.generate])
        settings.load_profile("mutation")
        os.environ[ACTIVE] = "stats"

    def pytest_runtestloop(self, session):
        """Run the tests once as they are, then on every mutant."""
        self.at_collection = set(self.called)
        self.items = {item.nodeid: item for item in session.items}
        with tempfile.NamedTemporaryFile("w+") as file:
            _wait(_fork(lambda: self._measure(file.name)))
            self.measured = json.load(file)
        failed = [name for name, test in self.measured.items() if test["failed"]]
        if failed:
            sys.exit(f"the tests fail as they are: {failed[:5]}")
        print(f"{len(self.items)} tests take {sum(t['seconds'] for t in self.measured.values()):.0f} s", flush=True)
        running = {}
        for mutant in [name for names in self.names.values() for name in names]:
            tests = self._tests_of(mutant)
            if not tests:
                self._note(mutant, "no test")
                continue
            if len(running) >= self.jobs:
                self._collect(running)
            running[_fork(lambda tests=tests, mutant=mutant: self._try(mutant, tests))] = mutant
        while running:
            self._collect(running)
        return True

    def _measure(self, path):
        measured = {}
        for name, item in self.items.items():
            self.called.clear()
            start = time.process_time()
            failed = self._fails(item)
            measured[name] = {
                "seconds": time.process_time() - start,
                "called": sorted(self.called),
                "failed": failed,
            }
        Path(path).write_text(json.dumps(measured), encoding="utf-8")
        return 0

    def _tests_of(self, mutant):
        """Tests that call the mutant's function: those of its own files first, of other files one case of each test."""
        own = files_of(mutant.split(".")[1])
        cases, chosen = Counter(), []
        for name, test in self.measured.items():
            if function_of(mutant) in test["called"]:
                base = name.partition("[")[0]
                cases[base] += 1
                few = cases[base] <= self.cases or test["seconds"] < CHEAP
                if (name.startswith(own) and few) or cases[base] == 1:
                    chosen.append((not name.startswith(own), cases[base] > 1, test["seconds"], name))
        return [name for *_, name in sorted(chosen)]

    def _try(self, mutant, tests):
        os.environ[ACTIVE] = mutant
        seconds = int(10 * sum(self.measured[name]["seconds"] for name in tests)) + 10
        most = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(
            resource.RLIMIT_CPU, (seconds if most == resource.RLIM_INFINITY else min(seconds, most),) * 2
        )
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20 * seconds)  # one that waits takes no time of the processor
        return 1 if any(self._fails(self.items[name]) for name in tests) else 0

    def _fails(self, item):
        self.failed = False
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        return self.failed

    def pytest_runtest_logreport(self, report):
        """Remember a failure, in whichever phase of a test."""
        self.failed |= report.failed

    def _collect(self, running):
        pid, code = os.wait()
        mutant, ended = running.pop(pid), os.waitstatus_to_exitcode(code)
        if ended not in ENDED:
            raise RuntimeError(f"the process of {mutant} ended with {ended}, which says nothing of its tests.")
        self._note(mutant, ENDED[ended])

    def _note(self, mutant, result):
        self.results[mutant] = result
        if result in ("survived", "no test"):
            print(f"\n{result}: {mutant}\n{difference(mutant)}", flush=True)
        if len(self.results) % 50 == 0:
            print(f"{time.strftime('%H:%M:%S')} {len(self.results)} {dict(Counter(self.results.values()))}", flush=True)


def _fork(work):
    """Run `work` in a fork that says nothing, and give its process."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        os._exit(work())
    except (KeyboardInterrupt, SystemExit):  # which a test lets through
        os._exit(1)
    except BaseException:
        os._exit(FAULT)


def _wait(pid):
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if ended:
        raise RuntimeError(f"the tests could not be measured: their process ended with {ended}.")


def again(mutant):
    """Try a mutant in a new process, on the tests of its module."""
    command = [sys.executable, "-m", "pytest", "-x", *QUICK, *files_of(mutant.split(".")[1])]
    done = subprocess.run(command, env=os.environ | {ACTIVE: mutant}, capture_output=True, check=False)
    return "killed" if done.returncode else "survived"


def difference(mutant):
    """Give the lines in which a mutant differs."""
    _, module, name = mutant.split(".", 2)
    source = Path("perceptual_diffusion", f"{module}.py").read_text(encoding="utf-8")
    original = f"{name.partition('__mutmut_')[0]}__mutmut_orig"
    code = {
        node.name: ast.unparse(node.args) + "\n" + "\n".join(map(ast.unparse, node.body))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name in (name, original)
    }
    lines = difflib.unified_diff(code[original].splitlines(), code[name].splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def main():
    """Run all of it, print what survived and the score of every module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=MODULES, metavar="MODULE")
    parser.add_argument("--every", type=int, default=1, help="try every N-th mutant only")
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="run N cases only of tests that are not cheap")
    parser.add_argument(
        "--again", type=Path, help="try only what was not found in this earlier report; the rest is taken from it"
    )
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--match", default="", help="try the mutants of functions whose name contains this")
    parser.add_argument("--report", type=Path, help="write the result of every mutant as JSON")
    options = parser.parse_args()
    report = options.report and options.report.resolve()
    earlier = json.loads(options.again.read_text("utf-8")) if options.again else {}
    known = {name: result for name, result in earlier.items() if result in ("killed", "timeout")}
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        names = tree(Path(folder), options.modules)
        names = {module: [n for n in found if options.match in n][:: options.every] for module, found in names.items()}
        if earlier:
            names = {module: [n for n in found if n in earlier] for module, found in names.items()}
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = folder
        run = Mutation(
            {m: [n for n in found if n not in known] for m, found in names.items()}, options.jobs, options.cases
        )
        files = [file for module in names for file in files_of(module)]
        if pytest.main([*QUICK, "-s", *files], plugins=[run]) or not (run.results or known):
            return 1
        for mutant, result in run.results.items():
            if result in ("survived", "no test") and function_of(mutant) in run.at_collection:
                run.results[mutant] = again(mutant)
                print(f"in a new process: {mutant} {run.results[mutant]}", flush=True)
        run.results |= {name: result for found in names.values() for name in found if (result := known.get(name))}
        if report:
            report.write_text(json.dumps(run.results, indent=1), encoding="utf-8")
    weak = False
    for module, found in names.items():
        count = Counter(run.results[name] for name in found)
        score = 100 * (count["killed"] + count["timeout"]) / max(1, len(found))
        weak |= score < LEAST
        print(f"{module}: {len(found)} mutants, {dict(count)}, {score:.1f} % found")
    return int(weak)


if __name__ == "__main__":
    sys.exit(main())
