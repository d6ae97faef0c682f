"""A model family of your own: registered once, wrapped everywhere."""

import torch
from torch import Tensor, nn

from perceptual_diffusion import SelfPerceptualObjective, adapters, schedules


class Tiny(nn.Module):
    """Takes log(t) as its time, and its channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.core, self.decode = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, image: Tensor, log_time: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.encode(image) + log_time.view(-1, 1, 1, 1))
        return {"velocity": self.decode(torch.tanh(self.core(hidden)))}


# the adapter
def tiny_adapter(model: Tiny) -> adapters.Adapter:
    """Say how a Tiny is called, where its middle is, and what it predicts."""
    return adapters.Adapter(
        family="Tiny",
        layers=("core",),
        call=lambda model, x_t, t, cond: model(x_t.movedim(1, -1), t.log(), **cond),
        output=lambda output, x_t: output["velocity"].movedim(-1, 1) if isinstance(output, dict) else output,
        prediction="flow_prediction",
    )


adapters.register(Tiny, tiny_adapter)
# end of the adapter

if __name__ == "__main__":
    model = Tiny()
    objective = SelfPerceptualObjective.wrap(model, schedules.Linear())
    loss = objective(model, torch.randn(4, 3, 8, 8))
    loss.backward()
    print(f"loss {loss.item():.5f}, compared at {objective.teacher.layers}")
