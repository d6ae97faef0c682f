"""A pass up to the tapped layers as one compiled graph.

What runs the model may be any Python: it runs as it is, and only the module's own `forward` is replaced by the compiled
function, which gives what the layers gave; then the pass is left. Inside the compiled function the forward is left too, by
an exception that is caught there, so that the graph holds nothing of what follows the last layer.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from perceptual_diffusion import taps
from perceptual_diffusion._shapes import map_tensors
from perceptual_diffusion.types import FeatureSelect


class _Left(BaseException):
    """Leaves the forward inside the compiled function. The compiler follows a class, raised, but not an instance."""


class _Done(BaseException):
    """Leaves whatever called the module, once its compiled forward is through."""


def options_of(value: bool | Mapping[str, Any]) -> dict[str, Any] | None:
    """Give the keyword arguments of torch.compile that `compile` stands for; None to compile nothing.

    Raises:
        TypeError: it is neither a bool nor a mapping.
    """
    if isinstance(value, bool):
        return {"fullgraph": True} if value else None
    if isinstance(value, Mapping):
        return {"fullgraph": True, **value}
    raise TypeError(f"`compile` is {value!r}, expected a bool, or keyword arguments of torch.compile as a dict.")


class CompiledPass:
    """Runs a module up to named layers in one compiled graph, with or without gradient.

    It is compiled by its first call. Double backward is not supported, as in torch.compile.

    Args:
        module: the module that holds the layers.
        layers: dotted names, at least one.
        select: takes what is wanted out of a layer's output; it is compiled, too.
        options: keyword arguments of torch.compile.

    Raises:
        ValueError: a layer does not exist, or the module's hooks allow no pass to be left early.
    """

    def __init__(
        self, module: nn.Module, layers: Sequence[str], *, select: FeatureSelect, options: Mapping[str, Any]
    ) -> None:
        self.module, self.layers, self.select, self.options = taps.unwrap(module), tuple(layers), select, dict(options)
        if not taps.may_stop(module, layers):
            raise ValueError(
                "`compile` is set, but the teacher is sharded or offloaded (FSDP, ZeRO-3, accelerate, diffusers), which cannot "
                "be one graph. Pass `compile=False`."
            )
        self._function: Callable[..., list[Any]] | None = None
        self._hooks: list[tuple[nn.Module, int, Callable[..., None]]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_function": None, "_hooks": []}  # compiled for this module, not for its copy

    def __call__(self, call: Callable[[nn.Module], Any]) -> list[Any]:
        """Run `call`, which runs the module it is given, and return what `select` took, in the order of `layers`.

        Raises:
            ValueError: the pass cannot be compiled, `call` does not run the module, or a layer did not run.
        """
        if self._function is None:
            self._function = self._build()
        found: list[list[Any]] = []
        done = _Done()
        held = {key: value for key, value in vars(self.module).items() if key in ("forward", "_compiled_call_impl")}

        def forward(*args: Any, **kwargs: Any) -> None:
            found.append(self._run(args, kwargs))
            raise done

        vars(self.module).update({"forward": forward, "_compiled_call_impl": None})
        try:
            call(self.module)
        except _Done as caught:
            if caught is not done:
                raise
            done.__traceback__ = None
        finally:
            for key in ("forward", "_compiled_call_impl"):
                vars(self.module).pop(key, None)
            vars(self.module).update(held)
        if not found:
            raise ValueError(
                f"`call` runs parts of {type(self.module).__name__} but not the module itself, so its pass cannot be compiled. "
                "Pass `compile=False`."
            )
        for name, taken in zip(self.layers, found[0], strict=True):
            if taken is None:
                raise ValueError(
                    f"the layer {name!r} of {type(self.module).__name__} did not run in this pass. Tap one that does."
                )
        return found[0]

    def _build(self) -> Callable[..., list[Any]]:
        module, layers, select = self.module, self.layers, self.select
        forward = vars(module).get("forward") or MethodType(type(module).forward, module)
        seen: dict[str, Any] = {}
        wanted = len(set(layers))

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                if name in seen:
                    return
                seen[name] = select(output, args, kwargs)
                if len(seen) == wanted:
                    raise _Left

            return hook

        def run(*args: Any, **kwargs: Any) -> list[Any]:
            seen.clear()
            try:  # noqa: SIM105  (older compilers do not follow `suppress`)
                forward(*args, **kwargs)
            except _Left:
                pass
            found = [seen.get(name) for name in layers]
            seen.clear()
            return found

        # torch counts recompilations by code object, and gives up at the eighth: each teacher needs one of its own.
        run.__code__ = run.__code__.replace()
        self._hooks = []
        for name in dict.fromkeys(layers):
            layer, hook = taps.layer(module, name), watch(name)
            handle = layer.register_forward_hook(hook, with_kwargs=True)
            self._hooks.append((layer, handle.id, hook))
            handle.remove()
        return torch.compile(run, **self.options)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        function = self._function
        if function is None:  # `__call__` has built it
            raise RuntimeError("the pass has not been compiled.")
        replayed = _replays(self.options)
        if replayed:
            args, kwargs = map_tensors(_own_gradient, args), map_tensors(_own_gradient, kwargs)
        for layer, key, hook in self._hooks:  # under the same keys each time, on which the graph depends
            layer._forward_hooks[key], layer._forward_hooks_with_kwargs[key] = hook, True
        try:
            found = function(*args, **kwargs)
        except Exception as error:
            if not _refused(error):
                raise
            raise ValueError(
                f"the teacher's pass cannot be compiled: {_reason(error)}. Pass `compile=False`."
            ) from error
        finally:
            for layer, key, _ in self._hooks:
                del layer._forward_hooks[key], layer._forward_hooks_with_kwargs[key]
        return [map_tensors(Tensor.clone, taken) for taken in found] if replayed else found


def _replays(options: Mapping[str, Any]) -> bool:
    """Whether outputs and gradients lie in memory that the next replay of a CUDA graph overwrites."""
    return (
        options.get("mode") in ("reduce-overhead", "max-autotune")
        or options.get("backend") == "cudagraphs"
        or bool((options.get("options") or {}).get("triton.cudagraphs"))
    )


def _own_gradient(tensor: Tensor) -> Tensor:
    """The same tensor, whose gradient is copied out of the memory that it was computed in."""
    if not tensor.requires_grad:
        return tensor
    alias = tensor.view_as(tensor)
    alias.register_hook(torch.clone)
    return alias


def _refused(error: Exception) -> bool:
    """Whether an error is the compiler's, and not one of the model or of the device."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def _reason(error: Exception) -> str:
    """The reason in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [type(error).__name__])[0]
    context = next((line for line in lines if line.startswith("Developer debug context:")), "")
    details = context.removeprefix("Developer debug context:").strip()
    return f"{reason} ({details})".removesuffix(" ()").replace(". (", " (").rstrip(".")
