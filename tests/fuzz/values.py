"""Hostile and harmless ways to change a valid argument: `(value, draw) -> value`, each with what has to come of it."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import strategies as st
from models import MLP, ConvNet
from torch import nn

from perceptual_diffusion import schedules as s

SAME, REFUSED, EITHER = "same", "refused", "either"
"""The call has to give the loss of Algorithm 1; to be refused; one of the two."""


@dataclass
class Other:
    """Something that holds a tensor and is none."""

    sample: object = None


FOREIGN = [
    None, 3, -1, 0.5, math.nan, True, "", "x", b"x", (), [], {}, {1: 2}, object(), Other(), Other, len, lambda: 1, 1j,
    range(3), np.ones(2), np.float32(1.0), [1.0, 2.0], ["a"], (None,), {"a": None}, [[1.0]], torch.float32, torch.Generator(),
    torch.nn.Identity(), Ellipsis, float, {"a": [torch.ones(2, 2)]},
]  # fmt: skip
"""What is no tensor, nor made of tensors of the right shape."""


def first(x):
    return next(iter(x.values())) if isinstance(x, dict) else x


def each(function):
    """Of several parts, change all."""
    return lambda x: {key: function(value) for key, value in x.items()} if isinstance(x, dict) else function(x)


def inference(x):
    with torch.inference_mode():
        return x.clone()


def spread(x):
    """The same values, with steps of other lengths in memory."""
    return torch.stack([x, x], -1)[..., 0]


def nested(x):
    return torch.nested.nested_tensor([x, x], layout=torch.jagged) if len(x) else x.to("meta")


HARMLESS = {
    "a copy": torch.clone,
    "other strides": spread,
    "last dimension first": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
    "a parameter": lambda x: torch.nn.Parameter(x.detach(), x.is_floating_point()),
    "made in inference mode": inference,
    "expanded": lambda x: x[:1].clone().expand_as(x),
    "constant": lambda x: torch.zeros((), dtype=x.dtype).expand_as(x),
}
WRONG = {
    "one rank less": lambda x: x[0] if len(x) else x.sum(),
    "one rank more": lambda x: x[None],
    "no rank": lambda x: torch.tensor(1.0),
    "a last 1": lambda x: x[..., None],
    "narrow": lambda x: x[..., :-1],
    "one sample more": lambda x: torch.cat([x, torch.zeros_like(x[:1]) if len(x) else x.new_zeros(1, *x.shape[1:])]),
    "twice the batch": lambda x: torch.cat([x, x, x.new_zeros(1, *x.shape[1:])]),
    "huge": lambda x: torch.zeros((), dtype=x.dtype).expand(2**40, *x.shape[1:]),
    "long": torch.Tensor.long,
    "bool": torch.Tensor.bool,
    "complex": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "float8, other": lambda x: x.to(torch.float8_e5m2),
    "int8": lambda x: x.to(torch.int8),
    "uint16": lambda x: x.to(torch.uint16),
    "on meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "a nested tensor": nested,
    "a dict": lambda x: {"a": x},
    "a numpy array": lambda x: x.detach().numpy(),
    "numbers": lambda x: x.detach().tolist(),
}
HELD = {"a list": lambda x: [x], "a tuple": lambda x: (x,), "a tuple of two": lambda x: (x, None)}
"""What a sample is not, and a model's output may be."""
DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
BROKEN = {"NaN": math.nan, "infinite": math.inf, "very large": 1e38}


def put(value):
    def function(x):
        x = x.clone()
        x.view(-1)[: 1 + x.numel() // 7] = value
        return x

    return function


def samples(name):
    """Ways to change clean, noise or a prediction."""
    return st.sampled_from(samples_of(name))


def samples_of(name):
    ways = [(name, SAME, each(way)) for name, way in HARMLESS.items()]
    ways += [(name, REFUSED, each(way)) for name, way in WRONG.items()]
    ways += [(way, EITHER if name == "model_pred" else REFUSED, HELD[way]) for way in HELD]
    ways += [(name, EITHER, each(lambda x, d=dtype: x.to(d))) for name, dtype in DTYPES.items()]
    ways += [(name, EITHER, each(put(value))) for name, value in BROKEN.items()]
    ways += [(f"{value!r}"[:30], REFUSED, lambda x, v=value: v) for value in FOREIGN if value is not None]
    return [*ways, ("only its first part", REFUSED, lambda x: first(x) if isinstance(x, dict) else {"a": {"b": x}})]


def at(index, value):
    def function(t):
        t = t.clone() if t.is_floating_point() or value == int(value) else t.float()
        t[index : index + 1] = value
        return t

    return function


def times(top):
    """Ways to change t or t' of a schedule whose times end at `top`."""
    ways = [(n, SAME, HARMLESS[n]) for n in ("a copy", "other strides", "made in inference mode", "expanded")]
    ways += [(n, REFUSED, w) for n, w in WRONG.items() if n not in ("long", "int8", "narrow")]
    ways += [(n, EITHER, lambda t, d=d: t.to(d)) for n, d in DTYPES.items() if d != torch.bfloat16]
    ways += [(f"{d}", EITHER, lambda t, d=d: t.to(d)) for d in (torch.int64, torch.int32, torch.int16, torch.uint8)]
    ways += [("bfloat16", REFUSED, torch.Tensor.bfloat16)]
    values = (math.nan, math.inf, -math.inf, -1, -1e-3, top * 1.01 + 1, 2.0**40)
    ways += [
        (f"one is {v}", REFUSED, lambda t, v=v: at(0, v)(t.double() if v != v or v in (math.inf, -math.inf) else t))
        for v in values
    ]
    ways += [(f"{value!r}"[:30], REFUSED, lambda t, v=value: v) for value in FOREIGN if value is not None]
    return st.sampled_from(ways)


CONDS = {
    "nothing": lambda cond: None,
    "empty": lambda cond: {},
    "an unknown name": lambda cond: {**cond, "unknown_name": 1},
    "a key that is no string": lambda cond: {**cond, 3: 1},
    "no values": lambda cond: dict.fromkeys(cond),
    "texts": lambda cond: dict.fromkeys(cond, "a cat"),
    "numbers": lambda cond: dict.fromkeys(cond, 1.5),
    "lists": lambda cond: {key: [value] for key, value in cond.items()},
    "tuples": lambda cond: {key: (value, value) for key, value in cond.items()},
    "dicts": lambda cond: {key: {"a": value} for key, value in cond.items()},
    "dataclasses": lambda cond: {key: Other(value) for key, value in cond.items()},
    "numpy arrays": lambda cond: {key: value.numpy() for key, value in cond.items()},
    "the sample's own names": lambda cond: {**cond, "sample": 1, "timestep": 2, "x": 3, "t": 4},
    "a mapping of another class": lambda cond: __import__("types").MappingProxyType(cond),
    "out of range": lambda cond: {key: value + 1000 for key, value in cond.items()},
    "negative": lambda cond: {key: -1 - value for key, value in cond.items()},
}


def conditions():
    """Ways to change the conditions; what comes of them is the model's to say."""
    ways = [(name, EITHER, way) for name, way in CONDS.items()]
    ways += [
        (f"each {name}", EITHER, lambda cond, w=way: {key: w(value) for key, value in cond.items()})
        for name, way in {**HARMLESS, **WRONG}.items()
        if name != "huge"
    ]
    ways += [
        (f"{value!r}"[:30], REFUSED, lambda cond, v=value: v)
        for value in FOREIGN
        if value is not None and not isinstance(value, dict)
    ]
    return st.sampled_from(ways)


def models():
    """Modules that cannot be wrapped, or only with what else is said."""
    shared = ConvNet()
    shared.register_buffer("graph", torch.ones(2, requires_grad=True) * 2)
    return [
        nn.Module(), nn.ModuleList([ConvNet()]), nn.Sequential(), nn.Identity(), ConvNet().to("meta"), ConvNet().half(), ConvNet().double(), ConvNet().eval(),
        ConvNet().requires_grad_(False), shared, nn.DataParallel(ConvNet()), MLP(), SimpleNamespace(components={}),
        SimpleNamespace(components={"unet": ConvNet(), "scheduler": 3}), ConvNet, torch.jit.ScriptModule(),
    ]  # fmt: skip


def schedules():
    """Schedules and schedulers, right and wrong."""
    return [
        s.Discrete.linear(), s.Discrete.cosine().zero_terminal_snr(), s.Cosine(), s.EDM(), s.Linear(shift=3, scale=1000), s.Linear(reverse=True), s.Linear,
        DDPMScheduler(), DDPMScheduler, FlowMatchEulerDiscreteScheduler(), DDPMScheduler(prediction_type="sample"), SimpleNamespace(config={}),
        SimpleNamespace(config={"prediction_type": "epsilon"}), lambda t: t, DDPMScheduler().config,
    ]  # fmt: skip


OUTPUTS = {
    "(x,)": (SAME, lambda x: (x,)),
    "(x, something)": (SAME, lambda x: (x, "more")),
    "[x]": (SAME, lambda x: [x]),
    ".sample": (SAME, Other),
    "inside out": (REFUSED, lambda x: Other(Other(x))),
    "a dict of it": (REFUSED, lambda x: {"sample": x}),
    "nothing": (REFUSED, lambda x: ()),
    "a class": (REFUSED, lambda x: Other),
    "deep": (REFUSED, lambda x: [[[[x]]]]),
    "a generator": (REFUSED, lambda x: (y for y in [x])),
    "itself": (REFUSED, lambda x: (own := []).append(own) or own),
    "with a variance": (EITHER, lambda x: torch.cat([x, x], 1)),
}


def outputs():
    """What a model may give in the place of its prediction."""
    ways = [(name, *pair) for name, pair in OUTPUTS.items()]
    ways += [way for way in samples_of("model_pred") if way[0] not in HELD and way[0] != "a parameter"]
    return st.sampled_from(ways)


NUMBERS = [
    -1,
    0,
    1,
    2,
    0.5,
    -0.5,
    1e30,
    2**70,
    math.nan,
    math.inf,
    -math.inf,
    True,
    "1",
    None,
    (),
    [1],
    1j,
    np.float32(1),
    torch.tensor(1.0),
]
NAMES = [
    "",
    "x",
    "uniform",
    "mse",
    "copy",
    "epsilon",
    "-epsilon",
    "--epsilon",
    "joint",
    "auto",
    "none",
    "\0",
    "x" * 5000,
    "é",
    b"mse",
    None,
    3,
    ("mse",),
]
PATHS = [
    "body", "stem", "head", "norm", "", ".", "body.", ".body", "..", "body.weight", "forward", "__class__", "_modules", "\0", "body\n",
    "x" * 5000, [], (), ["body"], ("stem", "body"), ["body", "body"], ["body", 3], [None], [["body"]], {"body": 1}, {"body"}, 3,
    b"body", None, object(), torch.nn.ModuleList(), iter(["body"]),
]  # fmt: skip
OPTIONS = {
    "prediction": [*NAMES, "sample", "flow_prediction", "velocity", torch.nn.Identity],
    "layers": PATHS,
    "output": [None, 3, "x", [], {}],
    "teacher": [*NAMES, [], {}, 0.5, torch.nn.Identity(), torch.nn.ModuleList(), torch.ones(2)],
    "features": [*NAMES, "noisy", "all", []],
    "t": [*NAMES, "logit_normal", "near", "clean", [], {}, 0.5, torch.ones(2)],
    "t_prime": [*NAMES, "near", "shifted", "logit_normal", "contributing", "clean", [], 0.5, torch.ones(2)],
    "distance": [*NAMES, "mae", "huber", "cosine", "normalised", [], 0.5, torch.nn.MSELoss],
    "formulation": [*NAMES, "split", []],
    "mse_weight": NUMBERS,
    "weight": [*NAMES, "min_snr", [], 0.5, torch.ones(2)],
    "t_range": [
        None, (0.1, 0.9), [0.2, 0.3], (0, 1), (0.9, 0.1), (0.5, 0.5), (math.nan, 0.5), (0.1, math.inf), (-1, 0.5), (0.1,), (0.1, 0.2, 0.3),
        "ab", "01", 3, 0.5, {}, ("a", "b"), (None, None), torch.tensor([0.1, 0.9]), (1j, 2j),
    ],
    "seed": [*NUMBERS, -(2**70)],
    "micro_batch": [*NUMBERS, 3, "auto", "x", [], {}],
    "teacher_dtype": [
        None, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn,

    ],
    "compile": [None, 0, 1, "x", "inductor", [], 0.5, torch.float32],
    "example": [
        None, (), (torch.ones(2, 3, 4, 4), None), (torch.ones(2, 3, 4, 4), {}), (torch.ones(2, 3, 4, 4), {"unknown": 1}),
        [torch.ones(2, 3, 4, 4), {}], (torch.ones(2, 3), {}), (torch.ones(2, 9, 4, 4), {}), (None, None), (1, 2), "ab",
        ({}, {}), (torch.ones(2, 3, 4, 4), 3), (torch.ones(2, 3, 4, 4).long(), {}), (torch.ones(0, 3, 4, 4), {}),
        (torch.ones(2, 3, 4, 4).to("meta"), {}), (torch.ones(()), {}), 3,
    ],
    "nonfinite": [*NAMES, "raise", "skip", "propagate", [], 0.5],
    "truncate": [True, False, None, 0, "x", [], 0.5],
}  # fmt: skip
"""Values of the options of `wrap`; some are right."""
