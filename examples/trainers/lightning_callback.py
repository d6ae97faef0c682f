"""Lightning: keep a module's `SelfPerceptualObjective` on the device, log its terms, save and restore its generators.

    class Model(LightningModule):
        def __init__(self):
            ...                                             # self.unet with its trained weights
            self.objective = SelfPerceptualObjective.wrap(self.unet, scheduler)

        def training_step(self, batch, index):
            return self.objective(self.unet, batch["latents"], cond={"encoder_hidden_states": batch["text"]})

    Trainer(callbacks=[SelfPerceptualCallback()]).fit(Model(), data)

The objective is no module: it enters neither the module's `state_dict` nor DDP. Since it is built in `__init__`, the teacher
of a run that goes on from a checkpoint is the model that the run began with, as it must be.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed


class SelfPerceptualCallback(Callback):
    """Looks after the objective of a LightningModule.

    Args:
        name: the module's attribute that holds it.
    """

    def __init__(self, name: str = "objective") -> None:
        self.name = name
        self.objective: Any = None
        self.saved: list[Tensor | None] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.objective = getattr(pl_module, self.name).to(pl_module.device)
        if self.saved:
            if len(self.saved) != trainer.world_size:
                raise ValueError(
                    f"the checkpoint is of {len(self.saved)} processes, and these are {trainer.world_size}. Go on with as many."
                )
            self.objective.set_rng_state(self.saved[trainer.global_rank], pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        terms = {f"train/{name}": value.mean() for name, value in self.objective.terms.items()}
        pl_module.log_dict(terms, batch_size=max(1, len(self.objective.terms["sp"])))

    def state_dict(self) -> dict[str, Any]:
        """Give the generator's state of each process. Lightning calls this on all of them."""
        states = [None if self.objective is None else self.objective.rng_state()]
        if distributed.is_available() and distributed.is_initialized():
            gathered: list[Tensor | None] = [None] * distributed.get_world_size()
            distributed.all_gather_object(gathered, states[0])
            states = gathered
        return {"generators": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = [state if state is None else torch.as_tensor(state) for state in state_dict["generators"]]
