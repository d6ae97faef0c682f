"""Run a function in a process of its own that is killed, is sent a signal, or finds the disk full at the n-th change of a folder.

A change is a file opened to be made or written, a rename, a removal, a folder made, an fsync, or a write by safetensors or torch,
which open files behind Python's back. The processes are forked, so that what is imported is there already.
"""

import contextlib
import errno
import os
import resource
import shutil
import signal
import sys
import traceback
from typing import NamedTuple

import safetensors.torch
import torch

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
WRITES = {"open", "safetensors", "torch.save"}
MADE = os.O_CREAT | os.O_TRUNC | os.O_APPEND
SOME = 50
"""The bytes that a file may have from the moment on at which a write is cut."""


class Ended(NamedTuple):
    """How a process ended: its exit code, the negative number of a signal, and what it said."""

    code: int
    said: str


def begin(function, *arguments):
    """Start a function in a forked process; gives what `end` waits for."""
    said, says = os.pipe()  # a file would be cut as well
    process = os.fork()
    if not process:
        code = 70
        try:
            for number in (1, 2):
                os.dup2(says, number)
            os.close(says)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            function(*arguments)
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(says)
    return process, said


def end(process, said):
    """Wait for a process."""
    with os.fdopen(said) as file:
        text = file.read()
    return Ended(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), text)


def child(function, *arguments):
    """Run a function in a forked process."""
    return end(*begin(function, *arguments))


def watch(root, act):
    """Call `act(n, kind)` before the n-th change of what is in `root`, for as long as this process lives."""
    count = 0

    def change(kind):
        nonlocal count
        count += 1
        act(count, kind)

    def audit(event, given):
        if event == "open":
            path, _, flags = given
            if flags & MADE and isinstance(path, str) and path.startswith(str(root)):
                change(event)
        elif event in CHANGES and (str(given[0]).startswith(str(root)) or not os.path.isabs(str(given[0]))):
            change(event)  # shutil.rmtree names what is in a folder by its name alone

    def before(module, name, kind):
        whole = getattr(module, name)

        def call(*arguments, **options):
            change(kind)
            return whole(*arguments, **options)

        setattr(module, name, call)

    before(os, "fsync", "fsync")
    before(safetensors.torch, "serialize_file", "safetensors")
    before(torch, "save", "torch.save")
    sys.addaudithook(audit)


def count(root, function, *arguments):
    """The kinds of the changes that a function makes in `root`."""
    kinds = []

    def counted():
        watch(root, lambda n, kind: kinds.append(kind))
        with contextlib.suppress(SystemExit):
            function(*arguments)
        print("\n" + " ".join(kinds))

    ended = child(counted)
    assert ended.code == 0, ended.said
    return ended.said.splitlines()[-1].split()


def images(root, place, moments, function, *arguments):
    """What a kill before each change would leave of `root`, each in a folder of its own; those of the same content once.

    The system keeps what a killed process has written, so the folder as it is then is what the next process finds.

    Args:
        root: the folder.
        place: for the images.
        moments: the numbers of the changes.
        function: makes the changes.
    """
    seen = set()

    def act(n, kind):
        if n not in moments or not root.exists():
            return
        found = [(path, path.stat()) for path in sorted(root.rglob("*"))]
        mark = tuple((str(path), x.st_ino, x.st_size, x.st_mtime_ns) for path, x in found if path.is_file())
        if (mark, len(found)) not in seen:
            seen.add((mark, len(found)))
            shutil.copytree(root, place / f"{n}-before-{kind}", copy_function=keep)

    def run():
        watch(root, act)
        function(*arguments)

    ended = child(run)
    assert ended.code == 0, ended.said
    return sorted(place.iterdir(), key=lambda path: int(path.name.partition("-")[0]))


def keep(source, target):
    """Link what is only ever replaced, as large states are, and copy what is written on."""
    whole = source.endswith(".safetensors") and ".tmp" not in source
    return os.link(source, target) if whole else shutil.copy2(source, target)


def killed(root, at, function, *arguments, torn=False):
    """Kill a function before its n-th change, or `torn` when that has written 50 bytes."""

    def act(n, kind):
        if n == at and torn:
            resource.setrlimit(resource.RLIMIT_FSIZE, (SOME, resource.RLIM_INFINITY))
        elif n == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the process ends in the middle of the write
        watch(root, act)
        function(*arguments)

    return child(run)


def filled(root, at, function, *arguments, torn=False):
    """Run a function that finds the disk full from its n-th change on, or `torn`, when each file has 50 bytes."""

    def act(n, kind):
        if n >= at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (SOME if torn else 0, resource.RLIM_INFINITY))
            if not torn and kind in ("open", "os.mkdir", "fsync"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def run():
        watch(root, act)
        function(*arguments)

    return child(run)


def signalled(root, at, number, times, function, *arguments):
    """Send a signal, once or twice, at the n-th change."""

    def act(n, kind):
        if at <= n < at + times:
            os.kill(os.getpid(), number)

    def run():
        watch(root, act)
        function(*arguments)

    return child(run)
