"""kohya-ss/sd-scripts: LoRA training of SD 1, SD 2 and SDXL with the self-perceptual loss added. Takes every option of theirs.

Put this file beside train_network.py and run it in its place:

    accelerate launch kohya_train.py --network_module networks.lora ...           # as train_network.py
    accelerate launch kohya_train.py --sdxl --network_module networks.lora ...    # as sdxl_train_network.py

`NetworkTrainer.process_batch` computes the loss; what it has weighted and masked stays, and L_sp is added to it per sample.
"""

import copy
import importlib
import sys
from typing import Any

from library import train_util
from torch import Tensor, nn

from perceptual_diffusion import SelfPerceptualObjective, schedules
from perceptual_diffusion.teachers import ModuleTeacher


class SelfPerceptual:
    """Comes before a `NetworkTrainer` among the bases of a class. `options` go to `SelfPerceptualObjective.wrap`."""

    options: dict[str, Any] = {"mse_weight": 0.0}

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[str, Tensor] = {}
        draw = train_util.get_noise_noisy_latents_and_timesteps

        def remembered(args: Any, noise_scheduler: Any, latents: Tensor) -> Any:
            found = draw(args, noise_scheduler, latents)
            self.drawn = {"clean": latents, "noise": found[0], "x_t": found[1], "t": found[2]}
            return found

        train_util.get_noise_noisy_latents_and_timesteps = remembered

    def post_process_network(
        self, args: Any, accelerator: Any, network: Any, text_encoders: Any, unet: nn.Module
    ) -> None:
        """Build the objective while the network is not yet in the UNet: the teacher shares its weights, which do not train."""
        super().post_process_network(args, accelerator, network, text_encoders, unet)
        base = copy.deepcopy(unet, {id(weight): weight for weight in unet.parameters()})
        predict = super().call_unet

        def call(model: nn.Module, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            with accelerator.autocast():
                return predict(args, accelerator, model, x_t, t, cond["text"], cond["batch"], self.weight_dtype)

        self.objective = SelfPerceptualObjective.wrap(
            unet,
            schedules.Discrete(
                self.get_noise_scheduler(args, "cpu").alphas_cumprod
            ),  # as args.zero_terminal_snr has it
            prediction="v_prediction" if args.v_parameterization else "epsilon",
            teacher=ModuleTeacher(base, layers=["middle_block.2" if self.is_sdxl else "mid_block"], call=call),
            **self.options,
        )

    def call_unet(
        self, args: Any, accelerator: Any, unet: nn.Module, noisy_latents: Tensor, timesteps: Tensor, text_conds: Any,
        batch: Any, weight_dtype: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Predict, and remember with which conditions."""
        given = args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype
        prediction: Tensor = super().call_unet(*given, **kwargs)
        if not kwargs:  # else it is the target of a sample that keeps the base's prediction
            self.prediction, self.cond, self.weight_dtype = (
                prediction,
                {"text": text_conds, "batch": batch},
                weight_dtype,
            )
        return prediction

    def post_process_loss(self, loss: Tensor, args: Any, timesteps: Tensor, noise_scheduler: Any) -> Tensor:
        """Add L_sp to the loss of each sample, (B,), with the sample's own weight."""
        loss = super().post_process_loss(loss, args, timesteps, noise_scheduler)
        if not self.drawn:
            raise SystemExit("this trainer draws its noise elsewhere: the plug-in is for SD 1, SD 2 and SDXL.")
        drawn = {name: tensor.detach() for name, tensor in self.drawn.items()}
        sp = self.objective.loss(self.prediction, cond=self.cond, reduction="none", **drawn)
        return loss + self.cond["batch"]["loss_weights"] * sp


if __name__ == "__main__":
    sdxl = "--sdxl" in sys.argv
    if sdxl:
        sys.argv.remove("--sdxl")
    script = importlib.import_module("sdxl_train_network" if sdxl else "train_network")
    trainer = type("Trainer", (SelfPerceptual, script.SdxlNetworkTrainer if sdxl else script.NetworkTrainer), {})
    args = script.setup_parser().parse_args()
    train_util.verify_command_line_training_args(args)
    trainer().train(train_util.read_config_from_file(args, script.setup_parser()))
