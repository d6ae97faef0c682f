"""What a call did: it is right, or one of the package's own statements refuses it; and nothing is left behind."""

import dis
import pathlib
import random
import re

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

import perceptual_diffusion

PACKAGE = str(pathlib.Path(perceptual_diffusion.__file__).parent)
NAMED = re.compile(r"`[^`]+`|^unknown |no module '|schedule|middle|prediction|feature")
"""What tells the reader which argument is meant."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def refusal(error):
    """Why an exception is not a refusal of the package's own; nothing if it is."""
    if not isinstance(error, ValueError | TypeError):
        return f"it is a {type(error).__name__}"
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    if not code.co_filename.startswith(PACKAGE):
        return f"it comes from {code.co_filename}:{last.tb_lineno}"
    if dis.opname[code.co_code[last.tb_lasti]] != "RAISE_VARARGS":
        return f"no `raise` made it, at {code.co_filename}:{last.tb_lineno}"
    if not NAMED.search(str(error)):
        return "it names no argument"
    return ""


def surroundings(*modules):
    """All that a call must leave as it is: streams, modes and hooks, of the process and of the modules."""
    of_modules = [
        (m.training, *(len(vars(m)[table]) for table in HOOKS), "forward" in vars(m))
        for module in modules
        for m in module.modules()
    ]
    of_weights = [(p.requires_grad, p._version, p.grad is None) for module in modules for p in module.parameters()]
    return {
        "random streams": (torch.get_rng_state().sum().item(), torch.get_rng_state()[:64].tolist(), random.getstate()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "torch's modes": (torch._C._len_torch_function_stack(), _get_current_dispatch_mode()),
        "saved tensors": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "global hooks": (
            len(torch.nn.modules.module._global_forward_pre_hooks),
            len(torch.nn.modules.module._global_forward_hooks),
        ),
        "dtype": torch.get_default_dtype(),
        "modules": of_modules,
        "weights": of_weights,
    }


def versions(value):
    """How often the tensors inside have been written to; nothing where torch does not count that."""
    if isinstance(value, torch.Tensor):
        return None if value.is_inference() else value._version
    if isinstance(value, dict):
        return {str(key): versions(item) for key, item in value.items()}
    return [versions(item) for item in value] if isinstance(value, list | tuple) else None


def outcome(call, *modules, given=()):
    """What `call` gives, or its refusal. It fails where that is no refusal, or where something is left behind."""
    before, written = surroundings(*modules), versions(given)
    error = None
    try:
        result = call()
    except Exception as caught:
        result, error = None, caught
    why = refusal(error) if error is not None else ""
    if why:
        raise AssertionError(f"{why}: {type(error).__name__}: {error}") from error
    after = surroundings(*modules)
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"left behind: {changed}, after {error!r}"
    assert versions(given) == written, f"an argument was written to, after {error!r}"
    return result, error
