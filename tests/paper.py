"""The objective with the options of the paper by default: what Algorithm 1 (`algorithm1.py`) computes."""

from perceptual_diffusion import PAPER, SelfPerceptualObjective


class PaperObjective(SelfPerceptualObjective):
    """`SelfPerceptualObjective`, with eq. 12 alone where nothing else is asked for."""

    def __init__(self, **options):
        super().__init__(**PAPER | options)

    @classmethod
    def wrap(cls, model, schedule=None, **options):
        return super().wrap(model, schedule, **PAPER | options)
