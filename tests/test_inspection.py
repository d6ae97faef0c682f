"""Blocks, costs and made-up inputs of models, and the command that prints them."""

import fnmatch
import json
import pathlib
import re
import resource
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from models import ConvNet, conditional_unet, dit, unet
from paper import PaperObjective
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner
from zoo import ROWS, build

from perceptual_diffusion import adapters, schedules
from perceptual_diffusion._shapes import describe
from perceptual_diffusion.cli import loading
from perceptual_diffusion.cli._app import app
from perceptual_diffusion.cli._errors import UserError
from perceptual_diffusion.inspection import Block, example, step_cost, trace

BASE = pathlib.Path(loading.__file__).parents[1] / "assets" / "base"
LABELS = {"class_labels": torch.tensor([1, 2])}
TEXT = {"encoder_hidden_states": torch.zeros(2, 5, 8)}
T = torch.tensor([100, 700])
MODELS = {
    "unet": (unet, torch.zeros(2, 3, 8, 8), LABELS, "mid_block"),
    "conditional unet": (conditional_unet, torch.zeros(2, 4, 8, 8), TEXT, "mid_block"),
    "dit": (dit, torch.zeros(2, 4, 8, 8), LABELS, "transformer_blocks.1"),
}
EVERY = pytest.mark.parametrize(("make", "x", "cond", "middle"), MODELS.values(), ids=MODELS)


def imagined():
    return FakeTensorMode(allow_non_fake_inputs=True)


def names(blocks, noisy=None):
    return [block.name for block in blocks if noisy is None or block.noisy is noisy]


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_a_unet_is_listed_as_a_person_would_in_execution_order():
    model, x = unet(), torch.zeros(2, 3, 8, 8)
    blocks = trace(model, lambda: model(x, T, **LABELS), sample=x)
    path = ["conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1", "conv_norm_out"]
    assert names(blocks, noisy=True) == [*path, "conv_out"]
    assert names(blocks, noisy=False) == ["time_embedding", "class_embedding"]
    found = {block.name: block for block in blocks}
    assert (found["mid_block"].kind, found["mid_block"].shapes) == ("UNetMidBlock2D", ((2, 16, 4, 4),))
    assert found["down_blocks.0"].shapes == ((2, 8, 4, 4),), "of the block's (hidden, skips), the hidden"


def test_a_transformer_is_listed_block_by_block():
    model, x = dit(num_layers=4), torch.zeros(2, 4, 8, 8)
    blocks = trace(model, lambda: model(x, T, **LABELS), sample=x)
    assert names(blocks, noisy=True) == ["pos_embed", *(f"transformer_blocks.{i}" for i in range(4)), "proj_out_2"]
    assert names(blocks, noisy=False) == ["proj_out_1"]
    shares = [block.flops_share for block in blocks if block.name.startswith("transformer_blocks")]
    assert max(shares) - min(shares) < 1e-9


def test_shares_of_a_convolutional_model_are_those_counted_by_hand():
    model, x = ConvNet(channels=3, width=6), torch.zeros(2, 3, 5, 7)
    blocks = trace(model, lambda: model(x, torch.zeros(2)), sample=x)
    ways = {"stem": (3, 6), "body": (6, 6), "head": (6, 3)}  # a 3 x 3 kernel at 35 places of 2 samples
    flops = {name: 2 * 2 * 35 * 9 * i * o for name, (i, o) in ways.items()}
    parameters = {name: 9 * i * o + o for name, (i, o) in ways.items()}
    assert {block.name: block.flops for block in blocks} == flops
    assert {block.name: block.parameters for block in blocks} == parameters
    for place, block in enumerate(blocks):
        assert block.flops_share == pytest.approx(block.flops / sum(flops.values()))
        assert block.parameters_share == pytest.approx(block.parameters / sum(parameters.values()))
        assert block.flops_until == pytest.approx(sum(list(flops.values())[: place + 1]) / sum(flops.values()))


@EVERY
def test_operations_are_those_of_torchs_own_counter(make, x, cond, middle):
    model = make().eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, timestep=T, **cond)
    cost = step_cost(model, lambda: model(x, timestep=T, **cond), [middle], sample=x)
    blocks = trace(model, lambda: model(x, timestep=T, **cond), sample=x)
    assert cost.forward == counter.get_total_flops()
    assert blocks[-1].flops_until == 1
    assert 0.8 * cost.forward < sum(block.flops for block in blocks) <= cost.forward


@EVERY
def test_fake_tensors_give_the_same_blocks_and_costs(make, x, cond, middle):
    model = make()

    def measure():
        def run():
            return model(x, timestep=T, **cond)

        return trace(model, run, sample=x), step_cost(model, run, [middle], sample=x)

    with imagined():
        fake = measure()
    assert fake == measure()


def test_a_model_of_a_hundred_gigabytes_is_traced_without_its_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with imagined():
        model = nn.Sequential(*(nn.Linear(100_000, 100_000) for _ in range(3)))
        x = torch.zeros(1, 100_000)
        blocks = trace(model, lambda: model(x), sample=x)
        cost = step_cost(model, lambda: model(x), ["1"], sample=x)
    assert sum(block.parameters for block in blocks) * 4 > 1e11
    assert cost.held_share == pytest.approx(2 / 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "in KiB"


@pytest.mark.slow
def test_stable_diffusion_xl_costs_what_was_counted_of_it_apart_from_this_package():
    """6.76 TFLOP a forward, 0.434 of it up to the middle, 1.451 times MSE, 0.484 of the weights."""
    with imagined():
        model = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=2,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        clean, cond = example(model)
        cost = step_cost(model, lambda: model(clean, T[:1], **cond), ["mid_block"], sample=clean)
    assert clean.shape == (1, 4, 128, 128)
    assert cost.forward == pytest.approx(6.76e12, rel=2e-3)
    assert cost.to_layers / cost.forward == pytest.approx(0.434, abs=5e-4)
    assert cost.ratio == pytest.approx(1.451, abs=1.5e-3)
    assert cost.held_share == pytest.approx(0.484, abs=5e-4)


class Nested(nn.Module):
    """A wrapper around a stack, as denoisers of EDM and many pipelines have it."""

    def __init__(self, stack):
        super().__init__()
        self.gain = nn.Linear(1, 1)
        self.inner = stack

    def forward(self, x, t):
        return self.inner(x) * self.gain(t[:, None].float())


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in range(2)])
        self.last = nn.Linear(8, 4)
        self.spare = nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        for one, two in self.layers:
            x = torch.tanh(two(one(x)))
        return self.last(x)


def test_a_wrapper_is_opened_and_lists_that_never_run_are_looked_into():
    model, x = Nested(Stack()), torch.zeros(3, 4)
    blocks = trace(model, lambda: model(x, torch.zeros(3)), sample=x)
    inside = [f"inner.layers.{i}.{j}" for i in range(2) for j in range(2)]
    assert names(blocks) == ["inner.first", *inside, "inner.last", "gain"]
    assert names(blocks, noisy=False) == ["gain"]


def test_a_stack_of_layers_is_opened_and_a_small_one_beside_it_is_not():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.time = nn.Sequential(nn.Linear(1, 4), nn.SiLU(), nn.Linear(4, 4))
            self.blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))

        def forward(self, x, t):
            return self.blocks(x + self.time(t[:, None]))

    model, x = Model(), torch.zeros(2, 4)
    blocks = trace(model, lambda: model(x, torch.zeros(2)), sample=x)
    assert names(blocks) == ["time", *(f"blocks.{i}" for i in range(9))]


def test_blocks_that_run_twice_count_twice_and_show_their_first_output():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(2)])

        def forward(self, x):
            for _ in range(2):
                for layer in self.layers:
                    x = layer(x)
            return x

    model, x = Twice(), torch.zeros(3, 4)
    first, second = trace(model, lambda: model(x), sample=x)
    assert (first.name, first.flops) == ("layers.0", 2 * 2 * 3 * 16)
    assert (first.flops_until, second.flops_until) == (0.25, 0.5)


@pytest.mark.parametrize("fails", [False, True])
def test_a_trace_leaves_nothing_behind(fails):
    model, x = ConvNet(norm=True, dropout=0.5).train(), torch.zeros(2, 3, 4, 4)
    model.body.eval()
    model.stem.weight.requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]

    def run():
        model(x, torch.zeros(2))
        if fails:
            raise KeyError("of the run")

    for measure in (lambda: trace(model, run, sample=x), lambda: step_cost(model, run, ["body"], sample=x)):
        if fails:
            with pytest.raises(KeyError):
                measure()
        else:
            measure()
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not x.requires_grad
        assert x.grad is None
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_dependence_is_not_said_where_it_was_not_asked():
    model = ConvNet()
    blocks = trace(model, lambda: model(torch.zeros(1, 3, 4, 4), torch.zeros(1)))
    assert {block.noisy for block in blocks} == {None}


def test_a_run_of_another_model_is_refused():
    model, other = ConvNet(), ConvNet()
    with pytest.raises(ValueError, match="`run` runs no module of `model`"):
        trace(model, lambda: other(torch.zeros(1, 3, 4, 4), torch.zeros(1)))


# --- cost -------------------------------------------------------------------------------------------------------------


def test_the_cost_of_a_convolutional_model_is_that_counted_by_hand():
    model, x = ConvNet(channels=3, width=6), torch.zeros(2, 3, 5, 7)
    cost = step_cost(model, lambda: model(x, torch.zeros(2)), ["body"], sample=x)
    stem, body, head = (2 * 2 * 35 * 9 * ways for ways in (18, 36, 18))
    forward = stem + body + head
    assert cost.forward == forward
    assert cost.mse == forward + forward + (body + head), "no gradient goes to the sample"
    assert cost.to_layers == stem + body
    assert cost.to_input == stem + body, "no gradient goes to the weights"
    assert cost.ratio == pytest.approx((cost.mse + 3 * (stem + body)) / cost.mse)
    assert cost.counted
    held = sum(p.numel() for p in (*model.stem.parameters(), *model.body.parameters()))
    assert (cost.held, cost.held_share) == (held, held / sum(p.numel() for p in model.parameters()))


def test_frozen_weights_make_the_mse_step_cheaper_and_the_objective_dearer_beside_it():
    model, x = ConvNet(), torch.zeros(2, 3, 5, 7)
    whole = step_cost(model, lambda: model(x, torch.zeros(2)), ["body"], sample=x)
    model.stem.requires_grad_(False)
    part = step_cost(model, lambda: model(x, torch.zeros(2)), ["body"], sample=x)
    assert part.mse < whole.mse
    assert part.ratio > whole.ratio
    assert part.to_input == whole.to_input


@EVERY
def test_the_weights_held_are_those_of_the_teacher_that_is_made(make, x, cond, middle):
    model = make()
    cost = step_cost(model, lambda: model(x, timestep=T, **cond), [middle], sample=x)
    objective = PaperObjective.wrap(model, DDIMScheduler(), seed=0)
    objective(model, torch.randn(x.shape), cond=cond)
    assert cost.held == objective.teacher.parameters_held
    assert 0 < cost.held_share < 1


def test_weights_used_without_running_their_module_are_held():
    class Borrowing(ConvNet):
        def forward(self, x, t):
            hidden = torch.nn.functional.conv2d(x, self.stem.weight, padding=1)
            return self.head(self.body(hidden))

    model, x = Borrowing(), torch.zeros(1, 3, 4, 4)
    cost = step_cost(model, lambda: model(x, torch.zeros(1)), ["body"], sample=x)
    assert cost.held == sum(p.numel() for p in (*model.stem.parameters(), *model.body.parameters()))


def test_a_model_without_a_backward_is_estimated_and_says_so():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise NotImplementedError("no backward")

    class Model(ConvNet):
        def forward(self, x, t):
            return super().forward(Opaque.apply(x * self.stem.bias.sum()), t)

    model, x = Model(), torch.ones(1, 3, 4, 4)
    cost = step_cost(model, lambda: model(x, torch.zeros(1)), ["body"], sample=x)
    assert not cost.counted
    assert cost.mse == 3 * cost.forward
    assert cost.to_input == cost.to_layers < cost.forward


def test_a_layer_that_does_not_exist_is_refused():
    model, x = ConvNet(), torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="no module 'mid' in ConvNet"):
        step_cost(model, lambda: model(x, torch.zeros(1)), ["mid"], sample=x)


# --- made-up inputs ---------------------------------------------------------------------------------------------------

NOT_MADE = {
    "AnyFlowFARTransformer3DModel", "Cosmos3OmniTransformer", "FluxTransformer2DModel.fill", "Ideogram4Transformer2DModel",
    "MiniMaxH3Transformer3DModel", "OmniGenTransformer2DModel", "RFD4ProteinaTransformer", "WanAnimate2Transformer3DModel",
}  # fmt: skip
"""Rows for which `example` says that inputs must be given."""
WRONG = {"PriorTransformer.shap_e"}
"""Rows for which the inputs do not fit, since nothing in the config says that the sample is a set of tokens."""
SIZES = {"UNet1DModel": 64}


def made(name):
    return name not in NOT_MADE | WRONG and name.split(".")[0] not in NOT_MADE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in ROWS if made(name)])
def test_inputs_are_made_from_the_config(name):
    model, tiny = build(name)
    clean, cond = example(model, 2, size=SIZES.get(name, 8))
    assert type(clean) is type(tiny.clean) or name == "Kandinsky6Transformer3DModel.video", "or with sound"
    adapter = adapters.find(model)
    t = torch.full((2,), 0.5 if adapter.time.endswith("unit") else 500.0)
    with torch.no_grad():
        predicted = adapter.output(adapter.call(model, clean, t, cond), clean)
    assert describe(predicted) == describe(clean)


@pytest.mark.parametrize("name", [name for name in ROWS if name in NOT_MADE or name.split(".")[0] in NOT_MADE])
def test_inputs_that_cannot_be_made_are_asked_for(name):
    model, _ = build(name)
    with pytest.raises(ValueError, match="Make the inputs yourself"):
        example(model, 2, size=8)


def test_at_least_three_quarters_of_the_classes_have_inputs():
    classes = {name.split(".")[0] for name in ROWS}
    assert len([name for name in classes if made(name)]) > 0.75 * len(classes) > 60


def test_the_extent_of_inputs_is_that_of_the_config_or_as_asked():
    model = conditional_unet()
    assert example(model)[0].shape == (1, 4, 8, 8)
    assert example(model, 3, size=16)[0].shape == (3, 4, 16, 16)
    assert example(model, size=(16, 24))[0].shape == (1, 4, 16, 24)
    clean, cond = example(conditional_unet(in_channels=9), size=8)
    assert (clean.shape, cond["concat"].shape) == ((1, 4, 8, 8), (1, 5, 8, 8)), "inpainting joins a mask and a picture"


@pytest.mark.parametrize("size", [(1, 2, 3, 4), (0, 8), (8.0, 8)])
def test_an_extent_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="`size` is"):
        example(conditional_unet(), size=size)


@pytest.mark.parametrize(("model", "error"), [(ConvNet(), TypeError), (3, TypeError)])
def test_inputs_are_for_models_with_a_config(model, error):
    with pytest.raises(error, match="expected a model of diffusers, with a config"):
        example(model)


# --- the command ------------------------------------------------------------------------------------------------------

MINE = """
import torch
from torch import nn
from perceptual_diffusion import schedules

class Net(nn.Module):
    def __init__(self, peek=False):
        super().__init__()
        self.peek = peek
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)])
        self.head = nn.Conv2d(8, 3, 3, padding=1)
        self.seen = None

    def forward(self, x, t):
        if self.peek and x.abs().sum().item() < 0:
            raise RuntimeError("never")
        x = torch.tanh(self.stem(x)) + t.view(-1, 1, 1, 1)
        self.seen = x.detach()
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)

KEPT = Net()
def net(): return Net()
def data(): return torch.randn(4, 3, 8, 8), {}
def full(): return KEPT, *data()
def peek(): return Net(peek=True), *data()
def timed(): return Net(), *data(), schedules.Linear()
def wrong(): return 3
def pair(): return Net(), 3
def text(): return Net(), data()[0], "a cat"
def fails(): raise KeyError("mine")
number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a module of the user's."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("mine", None)
    yield tmp_path
    sys.modules.pop("mine", None)


def inspect(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def facts(*arguments):
    result = inspect(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_packaged_model_is_inspected_with_its_scheduler():
    found = facts(BASE)
    assert found["class"] == "UNet2DModel"
    assert found["middle"]["layers"] == found["layers"] == ["mid_block"]
    assert found["process"]["scheduler"] == "DDIMScheduler"
    assert found["process"]["prediction"] == "v_prediction"
    assert found["process"]["error"] is None
    assert found["sample"]["clean"] == [1, 12, 16, 16]
    assert found["sample"]["on fake tensors"]
    assert set(found["blocks"][0]) == set(Block.__dataclass_fields__)
    assert [block["name"] for block in found["blocks"]][3:7] == [*(f"down_blocks.{i}" for i in range(3)), "mid_block"]
    assert 1.2 < found["cost"]["ratio"] < 1.3
    assert 0.35 < found["cost"]["held_share"] < 0.45


def test_what_json_says_is_printed():
    result = inspect(BASE)
    assert result.exit_code == 0, result.output
    for words in (
        "mid_block <-",
        "UNetMidBlock2D",
        "1 x 128 x 4 x 4",
        "v_prediction",
        "zero terminal SNR",
        "1.26 times",
    ):
        assert words in result.stdout, words


@pytest.fixture
def pipeline(tmp_path):
    """A pipeline's folder, without and with weights in safetensors."""
    model = unet()
    model.save_pretrained(tmp_path / "unet")
    DDIMScheduler(prediction_type="sample").save_pretrained(tmp_path / "scheduler")
    index = {
        "_class_name": "DDIMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


def test_a_pipelines_folder_gives_its_denoiser_and_scheduler(pipeline):
    for folder in (pipeline, pipeline / "unet"):
        found = facts(folder)
        assert (found["class"], found["process"]["prediction"]) == ("UNet2DModel", "sample")


def test_layers_size_and_batch_are_as_asked(pipeline):
    found = facts(pipeline, "--layers", "down_blocks.1", "--layers", "up_blocks.0", "--size", "16x24", "--batch", 3)
    assert found["layers"] == ["down_blocks.1", "up_blocks.0"]
    assert found["sample"]["clean"] == [3, 3, 16, 24]
    assert found["cost"]["to_layers"] > facts(pipeline, "--size", "16x24", "--batch", 3)["cost"]["to_layers"]


def test_code_of_the_users_gives_the_model(here):
    found = facts("mine:full")
    assert (found["class"], found["family"]) == ("Net", "general")
    assert found["middle"]["why"]
    assert [block["name"] for block in found["blocks"]] == ["stem", *(f"blocks.{i}" for i in range(4)), "head"]
    assert found["sample"] == {"clean": [4, 3, 8, 8], "cond": {}, "made up": False, "on fake tensors": True}
    assert found["process"]["schedule"] is None
    assert sys.modules["mine"].KEPT.seen is None, "the user's own model is not run on fake tensors"
    assert facts("mine:net", "--inputs", "mine:data")["blocks"] == found["blocks"]
    assert facts("mine:timed", "--prediction", "flow_prediction")["process"]["prediction"] == "flow_prediction"


def test_a_model_that_looks_at_values_is_run(here):
    found = facts("mine:peek")
    assert not found["sample"]["on fake tensors"]
    assert found["blocks"] == facts("mine:full")["blocks"]


def test_what_is_not_found_is_said_and_the_rest_is_shown(here):
    result = inspect("mine:timed")
    assert result.exit_code == 0, result.output
    assert "`prediction` is missing" in result.stdout
    assert "blocks.2" in result.stdout


def test_the_probe_ranks_the_layers_and_draws_them(here):
    found = facts("mine:timed", "--prediction", "flow_prediction", "--probe", "--plot", "probe.png")
    probe = found["probe"]
    assert sorted(probe["ranking"]) == [f"blocks.{i}" for i in range(4)]
    assert probe["note"] is None
    assert (here / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_a_probe_on_noise_says_that_it_is_weak(pipeline):
    found = facts(pipeline, "--probe", "--batch", 2)
    assert "normal noise" in found["probe"]["note"]
    assert found["probe"]["middle"] == ["mid_block"]
    result = inspect(pipeline, "--probe", "--batch", 2)
    assert "normal noise" in result.stdout
    assert "up_blocks.1" in result.stdout


ERRORS = {
    "nothing there": (["nothing"], "there is no folder 'nothing'. Give a folder of diffusers, a hub id"),
    "no network": (["owner/model"], "cannot be fetched from the hub"),
    "a file": (["mine.py"], "is a file, expected a folder"),
    "an empty folder": (["."], "holds no config.json or model_index.json"),
    "no module": (["other:net"], "there is no module 'other'"),
    "no function": (["mine:other"], "'mine' has no 'other'"),
    "no name": (["mine:"], "is no 'module:callable'"),
    "no callable": (["mine:number"], "is a int, expected a function"),
    "no model": (["mine:wrong"], r"gives \(int\), expected a model"),
    "a pair": (["mine:pair"], r"gives \(Net, int\), expected a model"),
    "no condition": (["mine:text"], "`cond` is a str, expected a mapping"),
    "it raises": (["mine:fails"], "'mine:fails' raises KeyError"),
    "no inputs": (["mine:net"], "Pass `--inputs module:callable`"),
    "wrong inputs": (["mine:net", "--inputs", "mine:wrong"], r"expected \(clean, cond\)"),
    "no layer": (["mine:full", "--layers", "mid"], "no module 'mid' in Net; at its top level: stem, blocks, head"),
    "no size": (["mine:full", "--size", "big"], "--size is 'big', expected 64"),
    "inputs and size": (["mine:full", "--size", "8"], "--size and --batch are for made-up inputs"),
    "no batch": (["mine:full", "--batch", "0"], "--batch is 0, expected at least 1"),
    "plot without probe": (["mine:full", "--plot", "x.png"], "--plot draws the probe"),
    "probe without schedule": (["mine:full", "--probe"], "--probe needs a schedule"),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_the_command_refuses_in_one_sentence(here, arguments, message):
    result = inspect(*arguments)
    assert result.exit_code == 2
    assert re.search(message, result.output), result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "name", ["os.system", "AutoencoderKL", "DiffusionPipeline", "builtins", None, 3, "UNet2DModel "]
)
def test_a_config_names_known_denoisers_only(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(UserError, match="which is not among the known ones"):
        loading.load(str(tmp_path))


def test_a_class_that_cannot_be_trained_is_refused_with_the_reason(tmp_path):
    config = {"_class_name": "DreamLiteTransformer2DModel", "in_channels": 16, "norm_num_groups": 4, "num_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = inspect(tmp_path)
    assert result.exit_code == 2
    assert "building block of other models" in result.output


@pytest.mark.parametrize(
    "listed", [{"../unet": ["diffusers", "UNet2DModel"]}, {"unet": ["diffusers", ["UNet2DModel"]]}, {}]
)
def test_a_pipeline_without_a_known_denoiser_is_refused(pipeline, listed):
    (pipeline / "model_index.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match="lists no denoiser that is known"):
        loading.load(str(pipeline))


def test_weights_in_half_precision_are_found(pipeline):
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert isinstance(loading.load(str(pipeline)).make(True), nn.Module)


def test_a_scheduler_is_a_known_one(pipeline):
    (pipeline / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "Popen"}')
    with pytest.raises(UserError, match="'Popen', which is not among the known ones"):
        loading.load(str(pipeline))


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        loading.load(str(tmp_path))


def test_weights_in_a_pickle_are_never_read(pipeline):
    """A pickle that would leave a file behind if it were loaded."""
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    trap = pipeline / "sprung"

    class Trap:
        def __reduce__(self):
            return pathlib.Path.touch, (trap,)

    torch.save(Trap(), weights.with_suffix(".bin"))
    weights.unlink()
    result = inspect(pipeline, "--probe", "--batch", 2)
    assert result.exit_code == 2
    assert "cannot be made" in result.output
    assert not trap.exists()


def test_of_a_hub_only_the_configs_are_fetched_and_for_a_probe_the_denoisers_weights(pipeline, monkeypatch, tmp_path):
    """A hub that is a folder: what matches the patterns is copied out of it."""
    (pipeline / "whole.safetensors").write_bytes(b"seven gigabytes")
    (pipeline / "vae").mkdir()
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"the autoencoder")
    cache = tmp_path / "cache"

    def snapshot_download(name, allow_patterns):
        assert name == "owner/model"
        for path in (p for p in pipeline.rglob("*") if p.is_file() and cache not in p.parents):
            place = str(path.relative_to(pipeline))
            if any(fnmatch.fnmatch(place, pattern) for pattern in allow_patterns):
                (cache / place).parent.mkdir(parents=True, exist_ok=True)
                (cache / place).write_bytes(path.read_bytes())
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)

    def fetched():
        return {str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file()}

    assert facts("owner/model")["class"] == "UNet2DModel"
    configs = {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json"}
    assert fetched() == configs
    facts("owner/model", "--probe", "--batch", 2)
    assert fetched() == configs | {"unet/diffusion_pytorch_model.safetensors"}


def test_inspecting_needs_no_weights(pipeline):
    (pipeline / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert facts(pipeline)["class"] == "UNet2DModel"


def test_the_command_itself_runs(here):
    done = subprocess.run(
        [sys.executable, "-c", "from perceptual_diffusion.cli import main; main()", "inspect", "mine:full", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["class"] == "Net"


def test_schedules_are_taken_as_they_are(here):
    assert isinstance(loading.load("mine:timed").scheduler, schedules.Linear)
