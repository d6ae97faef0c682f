"""Print docs/schedulers.md from the adapters' own table of diffusers' schedulers.

Run from the project's root: `python tools/schedulers_table.py > docs/schedulers.md`.
"""

from collections.abc import Iterable

from perceptual_diffusion.adapters.schedulers import SCHEDULERS, Case

HEAD = """\
# diffusers' schedulers

<!-- Printed by tools/schedulers_table.py from perceptual_diffusion/adapters/schedulers.py. Do not edit. -->

`SelfPerceptualObjective.wrap(model, scheduler)` reads schedule, prediction and unit of time from a diffusers scheduler. Each reading is checked
in the tests against the scheduler's own arithmetic: the noise that it adds, and a step that a perfect model output takes to the clean sample.
A subclass is read as its base. A class that is not here is refused: pass a schedule of `perceptual_diffusion.schedules` and `prediction=`.

- t is in the unit of the schedule, in `objective(...)` and in `objective.loss(..., t=...)` alike. T is the scheduler's `num_train_timesteps`.
- The model is given what the column says. Where that is x_t and t, its adapter turns t into the unit of its family (0 … 1000, 0 … 1, reversed).
- x_t = alpha_t x_0 + sigma_t ε. `flow_prediction` is ε − x_0 on `Linear`, also where it is reversed; a leading minus turns the sign.
- The variance-exploding sample of the Euler, Heun, LMS and KDPM2 schedulers' `add_noise` is x_t / alpha_t of the table. Their
  `scale_model_input` gives x_t, which is what the model is given.
- A flow's `shift` re-times the drawing of t, not the path: a timestep divided by T is sigma whatever the shift. It moves times toward the noise,
  which is at 0 where the schedule is reversed. With `use_dynamic_shifting`, the shift follows the sample's number of tokens: N of (B, N, C),
  H W / 4 of (B, C, H, W), F H W / 4 of (B, C, F, H, W). Audio (B, C, L) and frames-first video (B, F, C, H, W) would be miscounted: pass
  `t=timesteps.Uniform(shift=...)` there.
- With `invert_sigmas`, diffusers' timesteps and sigmas are inverted by `set_timesteps` only. Before it, `scheduler.timesteps` still hold T times the
  noise level; after it, `scale_noise` puts the noise at the data's end. t is here what the model is given: 0 at the noise.

## Read

| class | with | schedule | t | the model predicts | and is given | |
|---|---|---|---|---|---|---|
"""

REFUSED = """
## Refused

| classes | with | why | what to do |
|---|---|---|---|
"""


def settings(case: Case, cases: tuple[Case, ...]) -> str:
    """What the scheduler's config must hold for the case."""
    words = [f"`{key}={value!r}`" for key, value in case.when.items()]
    read = [other for other in cases if other.read is not None]
    return ", ".join(words) if words else "otherwise" if case.read is None or len(read) > 1 else ""


def row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def page() -> str:
    """All of docs/schedulers.md: a row for each class that is read, and one for each reason to refuse some."""
    read: list[str] = []
    refused: dict[tuple[str, ...], list[str]] = {}
    for name, cases in sorted(SCHEDULERS.items()):
        for case in cases:
            which = settings(case, cases) if len(cases) > 1 else ""
            if case.read is None:
                words = tuple(f"{sentence[0].upper()}{sentence[1:]}." for sentence in case.refused)
                refused.setdefault((which, *words), []).append(f"`{name}`")
            else:
                given = case.model or "x_t, t"
                read.append(row((f"`{name}`", which, case.schedule, case.time, case.prediction, given, case.note)))
    return HEAD + "".join(read) + REFUSED + "".join(row((", ".join(who), *why)) for why, who in refused.items())


if __name__ == "__main__":
    print(page(), end="")
