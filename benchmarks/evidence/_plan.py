"""What is compared: recipes of fine-tuning, and the paper's eight tables of them (Lin & Yang, arXiv 2401.00110)."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from perceptual_diffusion import timesteps

STEPS, LR = 1000, 1e-4
SEEDS = (0, 1, 2)
SEARCH_SEEDS = (100,)
SEARCHED = ("search", "length")
"""The tables of those seeds, which are compared with training pictures."""
FEW = 2000
"""Samples where the whole number would take too long on a CPU; compare rows of the same number only."""
SCALES = (1.25, 1.5, 2.0, 3.0)
RATES = (3e-5, 3e-4)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a base is fine-tuned.

    Attributes:
        loss: "mse", "self-perceptual", or None for the base as it is.
        steps: how many; of "mse" as many as cost what this many of `as_much_as` do.
        as_much_as: the recipe whose training compute is spent.
        lr: learning rate.
        teacher: "base"; "sp", a model trained by the recipe "sp" from the same seed; or "ema", the student's own average.
        options: more arguments of `SelfPerceptualObjective.wrap`.
    """

    loss: Literal["mse", "self-perceptual"] | None = "self-perceptual"
    steps: int = STEPS
    as_much_as: str | None = None
    lr: float = LR
    teacher: Literal["base", "sp", "ema"] = "base"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Falling(Recipe):
    """A recipe whose learning rate falls from its height to zero, along a line, over the whole run."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How samples are drawn, and how many if not as many as the base says.

    With guidance each step of the sampler takes two evaluations of the model.
    """

    steps: int = 25
    guidance: float = 1.0
    rescale: float = 0.0
    n: int | None = None


DOWN, MIDDLE = ["down_blocks.0", "down_blocks.1", "down_blocks.2"], "mid_block"
UP = ["up_blocks.0", "up_blocks.1", "up_blocks.2"]

SP = Recipe()
RECIPES: dict[str, Recipe] = {
    "base": Recipe(loss=None, steps=0),
    "sp": SP,
    "mse-equal-compute": Recipe(loss="mse", as_much_as="recommended"),
    "recommended": Recipe(options={"distance": "normalised", "mse_weight": 1.0, "t_prime": "contributing"}),
    "sp, encoder": replace(SP, options={"layers": DOWN}),
    "sp, decoder": replace(SP, options={"layers": UP}),
    "sp, encoder and middle": replace(SP, options={"layers": [*DOWN, MIDDLE]}),
    "sp, t' = t ± 40": replace(SP, options={"t_prime": "shifted"}),
    "sp, t' = t ± 10": replace(SP, options={"t_prime": timesteps.Shifted(by=10)}),
    "sp, t' ~ N(t, 100)": replace(SP, options={"t_prime": "near"}),
    "sp, mae": replace(SP, options={"distance": "mae"}),
    "sp, split": replace(SP, options={"formulation": "split"}),
    "sp, taught by sp": replace(SP, teacher="sp"),
    "sp, taught by its average": replace(SP, teacher="ema"),
}

for _rate in RATES:
    RECIPES |= {
        f"{name}, lr {_rate:g}": replace(RECIPES[name], lr=_rate) for name in ("mse-equal-compute", "sp", "recommended")
    }

RECIPES |= {f"{name}, falling rate": Falling(**vars(RECIPES[name])) for name in ("mse-equal-compute", "recommended")}

ADDED = {"distance": "normalised", "mse_weight": 1.0}
SEARCH = {
    f"search: {name}": Recipe(options=ADDED | options, as_much_as="recommended")
    for name, options in {
        "mse weight 0.3": {"mse_weight": 0.3},
        "mse weight 1": {},
        "mse weight 0.3, t' where it contributes": {"mse_weight": 0.3, "t_prime": "contributing"},
        "encoder and middle": {"layers": [*DOWN, MIDDLE]},
        "second block down": {"layers": ["down_blocks.1"]},
        "mean absolutes, mse weight 3": {"distance": "mae", "mse_weight": 3.0},
        "mse weight 3": {"mse_weight": 3.0},
        "decoder": {"layers": UP},
        "encoder": {"layers": DOWN},
        "t' ~ N(t, 100)": {"t_prime": "near"},
        "t' = t ± 40": {"t_prime": "shifted"},
        "min-SNR": {"weight": "min_snr"},
        "mean squares, mse weight 0.5": {"distance": "mse", "mse_weight": 0.5},
    }.items()
}
"""What is tried on one seed that no table has, against training pictures, before the recommended recipe is chosen; t' is uniform where not said."""
SEARCH["search: mse weight 1, lr 0.0003"] = Recipe(options=ADDED, as_much_as="recommended", lr=3e-4)
SHIFTED = "t' = t ± 40"
BY_40 = {"t_prime": "shifted"}
SEARCH |= {
    f"search: mean squares, {name}": Recipe(options=BY_40 | options, as_much_as="recommended")
    for name, options in {
        f"encoder and middle, {SHIFTED}": {"layers": [*DOWN, MIDDLE]},
        f"mse weight 0.1, {SHIFTED}": {"mse_weight": 0.1},
        f"mse weight 0.3, {SHIFTED}": {"mse_weight": 0.3},
        f"mse weight 1, {SHIFTED}": {"mse_weight": 1.0},
        "t' = t ± 10": {"t_prime": timesteps.Shifted(by=10)},
        "t' = t ± 100": {"t_prime": timesteps.Shifted(by=100)},
        f"encoder, {SHIFTED}": {"layers": DOWN},
        f"decoder, {SHIFTED}": {"layers": UP},
    }.items()
}
SEARCH[f"search: normalised alone, {SHIFTED}"] = Recipe(
    options=BY_40 | {"distance": "normalised"}, as_much_as="recommended"
)
SEARCH[f"search: mean squares, {SHIFTED}, lr 0.0003"] = Recipe(options=BY_40, as_much_as="recommended", lr=3e-4)
RECIPES |= SEARCH

LONGER = 4 * STEPS
LONGER_MSE = f"mse-equal-compute, {LONGER} steps"
RECIPES |= {
    f"recommended, {LONGER} steps": replace(RECIPES["recommended"], steps=LONGER),
    LONGER_MSE: replace(RECIPES["mse-equal-compute"], as_much_as=f"recommended, {LONGER} steps"),
}
"""Whether the gain grows with the training: what is said of steps is those of the recommended recipe."""

WHOLE, SHORT, LONG = Sampling(), Sampling(n=FEW), Sampling(n=FEW, steps=50)
PLAIN = (WHOLE, SHORT, LONG)
GUIDED = tuple(Sampling(n=FEW, guidance=3.0, rescale=rescale) for rescale in (0.0, 0.7))
SWEEP = (SHORT, *(Sampling(n=FEW, guidance=scale) for scale in SCALES))

Entry = tuple[str, str, tuple[Sampling, ...]]
"""A base, a recipe, and how it is sampled."""

UNET, FREE, DIT, EMOJI = "fashion-unet", "fashion-unet-unconditional", "fashion-dit-flow", "emoji-unet"
SOUND, CLIPS = "sonic-unet", "freedoom-unet3d"
COMPARED = ("base", "mse-equal-compute", "sp", "recommended")
FASTER = ("mse-equal-compute, lr 0.0003",)
NEAR, NEARER = f"sp, {SHIFTED}", "sp, t' = t ± 10"
HELD = tuple(
    f"search: mean squares, {what}, {SHIFTED}"
    for what in ("mse weight 0.3", "mse weight 1", "encoder and middle", "decoder")
)
"""What may hold the directions that the teacher's middle does not see."""

TABLES: dict[str, list[Entry]] = {
    "1": [
        *((UNET, name, (*PLAIN, *GUIDED)) for name in COMPARED[:2]),
        *((UNET, name, PLAIN) for name in COMPARED[2:]),
    ],
    "2": [(UNET, name, (SHORT,)) for name in ("sp, encoder", "sp, decoder", "sp, encoder and middle", "sp")],
    "3": [(UNET, name, (SHORT,)) for name in ("sp, t' = t ± 40", "sp, t' ~ N(t, 100)", "sp")],
    "4": [(UNET, name, (SHORT,)) for name in ("sp", "sp, mae")],
    "5": [(UNET, name, (SHORT,)) for name in ("sp", "sp, split")],
    "6": [(UNET, name, (SHORT,)) for name in ("sp", "sp, taught by sp", "sp, taught by its average")],
    "7": [(UNET, name, SWEEP) for name in COMPARED],
    "8": [(FREE, name, PLAIN) for name in COMPARED],
    "lr": [
        (UNET, name, (SHORT,))
        for name in RECIPES
        if name.startswith(COMPARED[1:]) and name.partition(", ")[2][:2] in ("", "lr")
    ]
    + [(FREE, f"{name}, lr {RATES[0]:g}", (WHOLE,)) for name in ("mse-equal-compute", "recommended")],
    "falling": [
        (base, f"{name}, falling rate", PLAIN) for base in (FREE, UNET) for name in ("mse-equal-compute", "recommended")
    ],
    "shifted": [(base, name, PLAIN) for base in (UNET, FREE) for name in (NEAR, NEARER)],
    "dit": [(DIT, "base", (SHORT, *GUIDED)), *((DIT, name, (SHORT,)) for name in (*COMPARED[1:], NEAR, NEARER))],
    "emoji": [
        (EMOJI, "base", (SHORT, *GUIDED)),
        *((EMOJI, name, (SHORT,)) for name in (*COMPARED[1:], NEAR, NEARER, *HELD)),
    ],
    "search": [("fashion-unet, search", name, (WHOLE,)) for name in (*COMPARED, *FASTER, NEAR, *SEARCH)],
    "length": [("fashion-unet, search", name, (WHOLE,)) for name in (LONGER_MSE, f"recommended, {LONGER} steps")],
    "audio": [(SOUND, "base", (WHOLE, Sampling(guidance=3.0))), *((SOUND, name, (WHOLE,)) for name in COMPARED[1:])],
    "video": [(CLIPS, name, (WHOLE,)) for name in COMPARED],
}
"""The paper's tables by their numbers, learning rates, falling ones, t' a fixed way from t, the search of a recipe, longer training on its seed, and the first comparison for a DiT with flow matching, sounds, and clips."""
