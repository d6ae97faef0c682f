"""README's code runs as it stands, and its two commands are the ones that CI and the demo's users run."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(8))

    def forward(self, x, t, encoder_hidden_states=None):
        for block in self.blocks:
            x = x + torch.tanh(block(x) + 0.001 * t[:, None, None, None])
        return x


def test_the_first_bash_block_runs_the_demo_and_the_second_the_tests():
    demo, tests = blocks("bash")
    assert len(demo.splitlines()) == 1
    assert demo.strip().endswith(".venv/bin/perceptual-diffusion demo")
    assert len(tests.splitlines()) == 1
    assert tests.strip().endswith(".venv/bin/python -m pytest -q -n 2")
    assert "block == 2' README.md" in (ROOT / ".ci/run").read_text()


def test_the_snippets_run_in_order_and_give_losses():
    from diffusers import DDPMScheduler, UNet2DConditionModel

    model = UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    latents, noise, text = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16), torch.randn(2, 5, 8)
    timesteps = torch.tensor([100, 700])
    names = {"model": model, "noise_scheduler": scheduler, "latents": latents, "text": text}
    whole, drop_in, explicit = blocks("python")
    exec(whole, names)
    assert names["loss"].requires_grad
    x_t = scheduler.add_noise(latents, noise, timesteps)
    names |= {"noise": noise, "timesteps": timesteps, "model_pred": model(x_t, timesteps, text).sample}
    exec(drop_in, names)
    names["loss"].backward()
    assert float(model.conv_in.weight.grad.abs().sum()) > 0
    names["model"] = Blocks()
    exec(explicit, names)
    loss = names["objective"](names["model"], latents)
    assert loss.isfinite()
    assert loss.requires_grad


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_of_the_readme_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_config_of_the_readme_is_one_that_train_takes(tmp_path):
    from perceptual_diffusion.cli import config

    (block,) = blocks("toml")
    (tmp_path / "run.toml").write_text(block)
    taken = config.load(tmp_path / "run.toml")
    assert taken.training.lora_rank == 16
    assert taken.data == str(tmp_path / "pictures")
