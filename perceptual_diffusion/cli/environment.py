"""What `doctor` tells of a machine: versions, devices, memory, settings. Nothing is imported that is not torch's or our own.

Every lookup may fail on a damaged machine, and is then "unknown".
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable
from getpass import getuser
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.torch_version import TorchVersion

import perceptual_diffusion

NAME = "perceptual-diffusion"
ROOT = Path(perceptual_diffusion.__file__).resolve().parents[1]
GIB = 2**30

SHOWN = (
    "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "CUDA_HOME",
    "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES", "DIFFUSERS_OFFLINE", "HF_HOME", "HF_HUB_OFFLINE", "HIP_VISIBLE_DEVICES",
    "KMP_AFFINITY", "KMP_BLOCKTIME", "LD_LIBRARY_PATH", "LD_PRELOAD", "LOCAL_RANK", "MKL_NUM_THREADS", "NCCL_DEBUG",
    "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "PYTHONHASHSEED", "PYTHONPATH",
    "PYTHONWARNINGS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ENABLE_MPS_FALLBACK", "RANK",
    "TORCHDYNAMO_DISABLE", "TORCHINDUCTOR_CACHE_DIR", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_COMPILE_DISABLE",
    "TORCH_HOME", "TORCH_LOGS", "WORLD_SIZE",
)  # fmt: skip
"""The environment variables that are shown: whole names, none of which holds a secret."""

BESIDE = ("bitsandbytes", "deepspeed", "flash-attn", "lightning", "numpy", "torchao", "triton", "xformers")
"""Packages that are shown where they are installed, though no extra for users names them."""

MALICIOUS = {"lightning": ("2.6.2", "2.6.3")}
"""Releases that ran an attacker's code when they were imported."""

COMPARE: dict[str, Callable[[TorchVersion, str], bool]] = {
    ">=": TorchVersion.__ge__,
    "<=": TorchVersion.__le__,
    "!=": lambda version, bound: not TorchVersion.__eq__(version, bound),
    "==": TorchVersion.__eq__,
    ">": TorchVersion.__gt__,
    "<": TorchVersion.__lt__,
}


def attempt(look: Callable[[], Any], otherwise: Any = "unknown") -> Any:
    """Give what a lookup gives, or `otherwise` where it raises."""
    try:
        return look()
    except Exception:
        return otherwise


# --- the machine ------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Give the machine and the versions of package, Python and torch, by name."""
    disk = disk_usage()
    return {
        NAME: f"{perceptual_diffusion.__version__}{_commit()}",
        "Python": attempt(lambda: f"{platform.python_version()} ({platform.python_implementation()})"),
        "system": attempt(platform.platform),
        "CPU": f"{attempt(_processor)}, {_cores()} cores, {attempt(torch.backends.cpu.get_cpu_capability)}",
        "memory": attempt(_memory),
        "free disk here": "unknown" if disk is None else f"{disk.free / GIB:.1f} of {disk.total / GIB:.1f} GiB",
        "torch": f"{torch.__version__}, {attempt(_build)}",
        "threads of torch": attempt(lambda: f"{torch.get_num_threads()} in an operation, {torch.get_num_interop_threads()} between them"),
        "variables": {name: _plain(os.environ[name]) for name in SHOWN if name in os.environ},
    }  # fmt: skip


def disk_usage() -> Any:
    """Give total and free bytes of the disk of the working directory; None where they are not known."""
    return attempt(lambda: shutil.disk_usage("."), None)


def _commit() -> str:
    """The commit of a clone, or the one that pip installed from."""
    if (ROOT / ".git").exists():

        def git(*words: str) -> str:
            return subprocess.run(
                ["git", "--no-optional-locks", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()  # fmt: skip

        def described() -> str:
            changed = git("status", "--porcelain", "--untracked-files=no")
            return f", commit {git('rev-parse', '--short=12', 'HEAD')}{' and changes' if changed else ''}"

        return str(attempt(described, ", commit unknown"))
    found = re.search(
        r'"commit_id": *"([0-9a-f]{12})', attempt(lambda: _distribution().read_text("direct_url.json")) or ""
    )
    return f", commit {found[1]}" if found else ""


def _distribution() -> metadata.Distribution:
    return metadata.distribution(NAME)


def _processor() -> str:
    if sys.platform == "linux":
        found = re.search(
            r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.M
        )
        if found:
            return found[1].strip()
    if sys.platform == "darwin":
        said = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=10)
        return said.stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


def _cores() -> Any:
    return attempt(lambda: len(os.sched_getaffinity(0)), os.cpu_count())


def _memory() -> str:
    """What there is, and what a container may use."""
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = attempt(lambda: int(Path("/sys/fs/cgroup/memory.max").read_text("ascii")), held)
    return f"{held / GIB:.1f} GiB" + (f", of which {limit / GIB:.1f} may be used" if limit < held else "")


def _build() -> str:
    parts = [
        f"CUDA {torch.version.cuda}" if torch.version.cuda else "",
        f"ROCm {torch.version.hip}" if torch.version.hip else "",
    ]
    built = " and ".join(part for part in parts if part)
    return f"built for {built}, cuDNN {attempt(torch.backends.cudnn.version)}" if built else "built for the CPU"


def devices() -> tuple[list[dict[str, str]], list[str]]:
    """Give the devices, the CPU first, and what torch warns of while it looks for them."""
    found, said = [{"device": "cpu", "is": attempt(_processor), "memory": attempt(_memory)}], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found += _accelerators()
        except Exception as error:
            said.append(f"torch cannot use its accelerator: {error}")
    said += [f"torch warns: {warning.message}" for warning in caught]
    if torch.version.cuda and len(found) == 1:
        said.append(f"this torch is built for CUDA {torch.version.cuda}, and there is no GPU that it can use")
    return found, said


def _accelerators() -> list[dict[str, str]]:
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    module = torch.get_device_module(kind)
    found = []
    for index in range(torch.accelerator.device_count()):
        facts = attempt(lambda index=index: module.get_device_properties(index), None)  # type: ignore[misc]
        memory = getattr(facts, "total_memory", None) or attempt(module.recommended_max_memory, None)
        capability = f", capability {facts.major}.{facts.minor}" if hasattr(facts, "major") else ""
        found.append({
            "device": f"{kind}:{index}",
            "is": f"{getattr(facts, 'name', kind)}{capability}",
            "memory": f"{memory / GIB:.1f} GiB" if memory else "unknown",
        })  # fmt: skip
    return found


# --- packages ---------------------------------------------------------------------------------------------------------


def requirements() -> dict[str, dict[str, str]]:
    """Give the versions that the package asks for, by extra ("" is the core) and package; of a clone by its pyproject.toml."""
    lines: list[tuple[str, str]] = []
    project = attempt(lambda: tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"], {})
    if project.get("name") == NAME:
        lines += [("", text) for text in project["dependencies"]]
        lines += [(extra, text) for extra, texts in project["optional-dependencies"].items() for text in texts]
    else:
        for text in attempt(lambda: _distribution().requires, None) or []:
            marker = re.search(r"extra == ['\"]([\w-]+)['\"]", text)
            lines.append((marker[1] if marker else "", text))
    found: dict[str, dict[str, str]] = {extra: {} for extra, _ in lines}
    inside: dict[str, list[str]] = {extra: [] for extra in found}
    for extra, text in lines:
        parts = re.match(r"\s*([\w.-]+)\s*(?:\[([^]]*)\])?\s*\(?([^;)]*)", text)
        if parts and parts[1] == NAME:
            inside[extra] += [name.strip() for name in (parts[2] or "").split(",")]
        elif parts:
            found[extra][parts[1].lower()] = parts[3].strip()

    def whole(extra: str) -> dict[str, str]:
        own = dict(found.get(extra, {}))
        for name in inside.get(extra, []):
            own |= whole(name)
        return own

    return {extra: whole(extra) for extra in found}


def version_of(package: str) -> str | None:
    """Give the installed version of a package without importing it; None where there is none."""
    found = attempt(lambda: metadata.version(package), None)
    return str(found) if found else None


def misfit(package: str, version: str, wanted: str) -> str:
    """Say what is wrong with an installed version; empty where nothing is."""
    if not version:
        return ""
    if version in MALICIOUS.get(package, ()):
        return f"{version} is a malicious release"
    for part in filter(None, (part.strip() for part in wanted.split(","))):
        bound = re.match(r"(>=|<=|!=|==|>|<)\s*([\w.+]+)$", part)
        if bound and not attempt(lambda bound=bound: COMPARE[bound[1]](TorchVersion(version), bound[2]), True):  # type: ignore[misc]
            return f"{version} is installed, expected {wanted}"
    return ""


def pip(extra: str) -> str:
    """Give the command that installs an extra: in a clone, or of the package."""
    return f"pip install -e '.[{extra}]'" if (ROOT / "pyproject.toml").is_file() else f"pip install '{NAME}[{extra}]'"


# --- what must not be told --------------------------------------------------------------------------------------------


def _plain(value: str) -> str:
    return ascii(value)[1:-1][:200]


def redact(value: Any) -> Any:
    """Give facts with the home folder as ~, users as USER, and nothing that a terminal would obey."""
    if isinstance(value, dict):
        return {redact(key): redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    text = "".join(letter if letter.isprintable() else " " for letter in value)
    homes = {attempt(lambda: str(Path.home()), ""), attempt(lambda: str(Path.home().resolve()), "")}
    for home in sorted(homes, key=len, reverse=True):
        if len(home) > 2:
            text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    text = re.sub(r"(?:/home|/Users|\b[A-Za-z]:[/\\]+Users)[/\\]+[^/\\\s:;'\"]+", "~", text)
    user = attempt(getuser, "")
    word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(user)}(?![A-Za-z0-9])")
    return re.sub(r"\S*[/\\]\S*", lambda path: word.sub("USER", path[0]), text) if user else text
