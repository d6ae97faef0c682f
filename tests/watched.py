"""The command under an audit hook, in a process of its own: what it wrote, what it ran, what it connected to.

`run` hands a command line to that process and gives what it found. As a script this file is that process: it reads jobs from
its input, one JSON on each line, and answers in the same way.
"""

import atexit
import functools
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

MEMORY = 12 * 2**30
SECONDS = 120
"""What a command may take: a command that asks for more has not refused what it was given."""
ONE_PATH = ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr")  # fmt: skip
TWO_PATHS = ("os.rename", "os.link", "os.symlink")
RUNS = ("pickle.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill", "pty.", "cpython.run")  # fmt: skip
CONNECTS = ("socket.__new__", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostby", "urllib.", "http.", "ftplib.", "smtplib.")  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MAKERS = ("typing.py", "dataclasses.py", "collections/__init__.py", "torch/fx/operator_schemas.py")
"""Installed files that evaluate texts of installed files: annotations and operators' signatures."""
NVML = "libnvidia-ml.so.1"
"""What torch asks for the number of GPUs."""


class Watcher:
    """An audit hook that notes, while it is on, what a command must not do."""

    def __init__(self):
        self.on, self.folder, self.may_write, self.found = False, "", (), []
        roots = (
            sysconfig.get_path("stdlib"),
            sysconfig.get_path("purelib"),
            Path(__file__).parents[1] / "perceptual_diffusion",
        )
        self.trusted = tuple(os.path.realpath(root) + os.sep for root in roots)

    def __call__(self, event, given):
        if not self.on:
            return
        self.on = False  # what the hook itself does is not looked at
        try:
            if (why := self.judge(event, given)) and (self.folder in why or event == "import" or not importing()):
                self.found.append(f"{event}: {why}")
        finally:
            self.on = True

    def judge(self, event, given):
        """What is wrong with an event, or None."""
        if event == "open":
            path, _, flags = given
            return None if isinstance(path, int) or not flags & WRITING else self.outside(path, follow=True)
        if event == "os.mkdir" and os.path.isdir(given[0]):
            return None  # it cannot make another
        if event in ONE_PATH:
            place = given[-1] if isinstance(given[-1], int) and event != "os.chmod" else -1
            follow = event not in ("os.remove", "os.rmdir", "os.mkdir")
            return self.outside(
                given[0], -1 if event in ("os.truncate", "os.setxattr", "os.removexattr") else place, follow
            )
        if event in TWO_PATHS:
            paths = given[1:2] if event == "os.symlink" else given[:2]
            return next(filter(None, (self.outside(path) for path in paths)), None)
        if event == "exec":
            return self.untrusted(given[0].co_filename)
        if event == "compile":
            return self.untrusted(given[1])
        if event == "import":
            return given[0] if given[0].startswith("hostile") else None
        if event == "ctypes.dlopen":
            return None if given[0] in (None, NVML) else self.untrusted(given[0])
        return repr(given)[:200] if event.startswith((*RUNS, *CONNECTS)) else None

    def outside(self, path, place=-1, follow=False):
        """The path, if it lies where nothing may be written; of a link itself, unless it is followed."""
        if isinstance(path, int):
            return None
        path = os.fsdecode(path)
        if place >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{place}"), path)
        real = os.path.realpath(path) if follow else os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))  # fmt: skip
        inside = real == os.devnull or any(real == root or real.startswith(root + os.sep) for root in self.may_write)
        return None if inside else real

    def untrusted(self, file):
        """Where code comes from, if that is neither an installed file nor a text of one."""
        file = os.fsdecode(file) if isinstance(file, str | bytes) else str(file)
        if file.startswith("<frozen") or os.path.realpath(file).startswith(self.trusted):
            return None
        maker = next(callers())
        return None if maker.startswith(self.trusted) and maker.endswith(MAKERS) else f"{file} by {maker}"


def importing():
    """Whether an installed module does this while it is imported."""
    return any(file.startswith("<frozen importlib") for file in callers())


def callers():
    """The files on the stack, from the inside out, without this one."""
    frame = sys._getframe()
    while frame := frame.f_back:
        if frame.f_code.co_filename != __file__:
            yield frame.f_code.co_filename


def serve():
    """Answer jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    watcher = Watcher()
    sys.addaudithook(watcher)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import torch
    from diffusers import DDPMPipeline  # noqa: F401  (what diffusers itself logs on import is no output of the command)
    from typer.testing import CliRunner

    from perceptual_diffusion.cli import train
    from perceptual_diffusion.cli._app import app

    torch.set_num_threads(1)
    train.SAMPLES = train.SAMPLING_STEPS = 1
    print("ready", file=answers, flush=True)
    home, scratch = Path.cwd(), os.path.realpath(os.environ["MPLCONFIGDIR"])
    for line in sys.stdin:
        job = json.loads(line)
        if "accelerate" in sys.modules:
            sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
        os.chdir(job["folder"])
        tempfile.tempdir = job.get("temporary")
        path, watcher.found = list(sys.path), []
        watcher.folder = os.path.realpath(job["folder"]) + os.sep
        watcher.may_write = (scratch, *map(os.path.realpath, job["may_write"]))
        watcher.on = job["watch"]
        done = CliRunner().invoke(app, job["arguments"])
        watcher.on = False
        os.chdir(home)
        sys.path[:] = path
        loaded = [
            name
            for name, module in sys.modules.items()
            if str(getattr(module, "__file__", "")).startswith(watcher.folder)
        ]
        error = "" if done.exception is None or isinstance(done.exception, SystemExit) else repr(done.exception)
        if error and job.get("trace"):
            import traceback

            error += "".join(traceback.format_exception(done.exception))
        answer = {
            "code": done.exit_code,
            "out": done.stdout,
            "err": done.stderr,
            "raised": error,
            "found": watcher.found + loaded,
        }
        print(json.dumps(answer), file=answers, flush=True)


@functools.cache
def _process(offline):
    """The process, started once for each of the two ways."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    scratch = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    given = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    given |= dict.fromkeys(("TMPDIR", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"), scratch)
    process = subprocess.Popen(
        [sys.executable, __file__], env=own | given | ({"HF_HUB_OFFLINE": "1"} if offline else {}), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=Path(__file__).parent,
    )  # fmt: skip
    atexit.register(stop, process)
    assert process.stdout.readline() == "ready\n"
    return process


def stop(process):
    """End the process; it has nothing to finish."""
    process.kill()
    process.communicate()


def run(arguments, folder, may_write=(), *, offline=True, watch=True, **more):
    """Run a command line in `folder`, and give its exit code, output, error, exception, and what it should not have done."""
    process = _process(offline)
    job = {"arguments": [str(argument) for argument in arguments], "folder": str(folder), "watch": watch, **more}
    process.stdin.write(json.dumps({**job, "may_write": [str(path) for path in may_write]}) + "\n")
    process.stdin.flush()
    ready, _, _ = select.select([process.stdout], [], [], SECONDS)
    line = process.stdout.readline() if ready else ""
    if not line:
        stop(process)
        _process.cache_clear()
        raise AssertionError(f"{job['arguments']} {'crashed' if ready else f'took more than {SECONDS} s'}")
    return json.loads(line)


if __name__ == "__main__":
    serve()
