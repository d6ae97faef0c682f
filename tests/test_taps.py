"""Taps: the features of a full run, an early stop, and nothing left behind."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from algorithm1 import features
from models import ConvNet, conditional_unet, dit, unet
from torch import nn

from perceptual_diffusion import taps

X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
LABELS = {"class_labels": torch.tensor([1, 2])}


def call_unet(model, x, t, cond):
    return model(x, t, **cond)


def run(model, layers, x=X, **options):
    return taps.run(model, layers, lambda: call_unet(model, x, T, LABELS), **options)


def hooks(model):
    return [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]


class Joint(nn.Module):
    """A block of two streams, as transformers on text and image have it; `order` says which comes out first."""

    def __init__(self, order):
        super().__init__()
        self.linear, self.order = nn.Linear(3, 3), order

    def forward(self, hidden, text):
        streams = {"hidden": self.linear(hidden), "text": 2 * text}
        return tuple(streams[name] for name in self.order)


class TwoBlocks(nn.Module):
    def __init__(self, order=("hidden", "text"), by_name=False):
        super().__init__()
        self.joint, self.shared, self.unused, self.by_name = Joint(order), nn.Linear(3, 3), nn.Linear(3, 3), by_name

    def forward(self, hidden, text):
        both = self.joint(hidden=hidden, text=text) if self.by_name else self.joint(hidden, text)
        return self.shared(self.shared(hidden)) + both[self.joint.order.index("hidden")]


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize(
    "layers",
    [
        ["mid_block"],
        ["conv_in"],
        ["mid_block", "down_blocks.0"],
        ["down_blocks.1.attentions.0", "up_blocks.0", "mid_block"],
    ],
)
def test_features_are_those_of_a_full_run_bit_for_bit(layers, stop):
    model = unet()
    found, expected = run(model, layers, stop=stop), features(model, layers, call_unet, X, T, LABELS)
    assert len(found) == len(layers)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("make", "layer", "channels", "cond"),
    [
        (conditional_unet, "mid_block", 4, {"encoder_hidden_states": torch.ones(2, 3, 8)}),
        (dit, "transformer_blocks.1", 4, LABELS),
    ],
)
def test_features_of_other_families_are_those_of_a_full_run(make, layer, channels, cond):
    model, x = make().eval(), torch.randn(2, channels, 8, 8)
    (found,) = taps.run(model, [layer], lambda: model(x, timestep=T, **cond))
    (expected,) = features(model, [layer], lambda m, x, t, c: m(x, timestep=t, **c), x, T, cond)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("stop", [True, False])
def test_nothing_runs_after_the_last_layer(stop):
    model, ran = unet(), []
    for name, module in model.named_modules():
        if name and "." not in name:
            module.register_forward_pre_hook(lambda m, args, name=name: ran.append(name))
    run(model, ["mid_block", "conv_in"], stop=stop)
    later = {"conv_norm_out", "conv_act", "conv_out"}
    assert {"conv_in", "mid_block"} <= set(ran)
    assert bool(later & set(ran)) is not stop


def test_gradient_to_the_input_is_that_of_a_full_run():
    model, gradients = unet(), []
    for features_of in (run, lambda m, layers, x: features(m, layers, call_unet, x, T, LABELS)):
        x = X.clone().requires_grad_()
        (feature,) = features_of(model, ["mid_block"], x)
        gradients.append(torch.autograd.grad(feature.square().sum(), x)[0])
    assert torch.equal(*gradients)


def test_the_features_come_in_the_order_of_the_names_also_when_one_is_named_twice():
    model = unet()
    mid, stem, again = run(model, ["mid_block", "conv_in", "mid_block"])
    assert mid is again
    assert mid.shape == (2, 16, 4, 4)
    assert stem.shape == (2, 8, 8, 8)


def test_a_layer_that_runs_several_times_gives_its_first_output():
    model, hidden = TwoBlocks(), torch.randn(2, 3)
    for stop in (True, False):
        (feature,) = taps.run(model, ["shared"], lambda: model(hidden, hidden), stop=stop)
        assert torch.equal(feature, model.shared(hidden))


# --- what is left behind ----------------------------------------------------------------------------------------------


def test_no_hook_is_left_after_a_pass():
    model = unet()
    run(model, ["mid_block", "conv_in"])
    assert hooks(model) == []


def test_no_hook_is_left_after_an_exception_in_the_model():
    model = unet()
    with pytest.raises(RuntimeError, match="expected input"):
        run(model, ["mid_block", "up_blocks.0"], X[:, :2])
    assert hooks(model) == []


@pytest.mark.parametrize("layers", [["nowhere"], ["mid_block", "nowhere"], ["mid_block", "conv_in", "down_blocks.7"]])
def test_no_hook_is_left_after_a_missing_layer(layers):
    model = unet()
    with pytest.raises(ValueError, match="no module"):
        run(model, layers)
    assert hooks(model) == []


def test_no_hook_is_left_after_a_layer_that_gives_no_tensor():
    model = unet()
    with pytest.raises(ValueError, match="holds no tensor"):
        run(model, ["mid_block"], select=lambda output, args, kwargs: taps.select("text", args, kwargs))
    assert hooks(model) == []


def test_the_users_own_hooks_stay_and_run():
    model, seen = unet(), []
    model.mid_block.register_forward_hook(lambda m, args, out: seen.append(out))
    (feature,) = run(model, ["mid_block"])
    assert seen[0] is feature
    assert hooks(model) == ["mid_block"]


def test_an_early_stop_keeps_no_activation_alive():
    model, activations = ConvNet(), []
    model.body.register_forward_pre_hook(lambda m, args: activations.append(weakref.ref(args[0])))
    gc.disable()  # the frames of the pass hold it until it is stopped, and no cycle may hold it then
    try:
        with torch.no_grad():
            (feature,) = taps.run(model, ["body"], lambda: model(X, T))
        assert activations[0]() is None
    finally:
        gc.enable()
    assert feature.shape == (2, 6, 8, 8)


def test_runs_inside_one_another_stop_only_themselves():
    outer, inner = ConvNet(), ConvNet()
    outer.stem.register_forward_hook(lambda m, args, out: taps.run(inner, ["stem"], lambda: inner(X, T)) and None)
    (found,) = taps.run(outer, ["head"], lambda: outer(X, T))
    assert torch.equal(found, outer(X, T))
    (found,) = taps.run(outer, ["head"], lambda: taps.run(inner, ["body"], lambda: outer(X, T)))
    assert torch.equal(found, outer(X, T))


def test_an_exception_of_the_model_is_passed_on():
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taps.run(unet(), ["mid_block"], fail)


# --- names and outputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mid", r"no module 'mid' in UNet2DModel; at its top level: conv_in, time_proj, .*mid_block, .*conv_out\.$"),
        ("mid_block.conv", r"no module 'mid_block.conv' in UNet2DModel; in mid_block: attentions, resnets\.$"),
        ("down_blocks.9", r"no module 'down_blocks.9' in UNet2DModel; in down_blocks: 0, 1\.$"),
        ("down_blocks.0.resnets.5", r"in down_blocks.0.resnets: 0\.$"),
        ("conv_in.weight", r"in conv_in: no module\.$"),
        ("", r"no module ''"),
    ],
)
def test_a_layer_that_does_not_exist_lists_the_names_at_its_level(name, message):
    with pytest.raises(ValueError, match=message):
        run(unet(), [name])


def test_a_layer_that_never_runs_is_named():
    model = TwoBlocks()
    with pytest.raises(ValueError, match="the layer 'unused' of TwoBlocks did not run in this pass"):
        taps.run(model, ["shared", "unused"], lambda: model(torch.ones(2, 3), torch.ones(2, 3)))
    assert hooks(model) == []


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("order", [("hidden", "text"), ("text", "hidden")])
def test_of_a_tuple_the_element_with_the_shape_of_the_first_input_is_taken(order, by_name):
    model, hidden, text = TwoBlocks(order, by_name), torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    (feature,) = taps.run(model, ["joint"], lambda: model(hidden, text))
    assert torch.equal(feature, model.joint.linear(hidden))


def test_a_feature_is_what_the_layer_gave_also_if_the_model_overwrites_it_later():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3)), torch.randn(4, 3)
    first, _ = taps.run(model, ["0", "2"], lambda: model(x))
    assert torch.equal(first, model[0](x))


def test_of_a_tuple_of_other_shapes_the_first_tensor_is_taken():
    model = unet()
    (feature,) = run(model, ["down_blocks.0"])  # (hidden, residuals), halved in height and width
    assert feature.shape == (2, 8, 4, 4)


def test_an_integer_output_is_refused():
    model = nn.Sequential(nn.Identity())
    with pytest.raises(ValueError, match="the layer '0' gives no floating tensor"):
        taps.run(model, ["0"], lambda: model(torch.ones(2, dtype=torch.long)))


def test_a_layer_whose_streams_cannot_be_told_apart_is_refused():
    class Joint(nn.Module):
        def forward(self, image, text):
            return text, image

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Joint()

        def forward(self, image, text):
            return self.block(image, text)

    model, image = Model(), torch.randn(2, 6, 4)
    assert taps.run(model, ["block"], lambda: model(image, torch.randn(2, 5, 4)))[0] is image
    with pytest.raises(ValueError, match="cannot be told"):
        taps.run(model, ["block"], lambda: model(image, torch.randn(2, 6, 4)))


def test_a_pass_of_another_thread_that_comes_and_goes_disturbs_none():
    """The other takes its hooks off while this one is among those of a layer, and so keeps what it has read of them."""
    model, (hidden, text) = TwoBlocks(), torch.randn(2, 2, 3)
    on, inside, off = threading.Event(), threading.Event(), threading.Event()

    def select(output, args, kwargs):
        inside.set()
        assert off.wait(60)
        return output[0]

    def here():
        assert on.wait(60)
        return model(hidden, text)

    def there():
        on.set()
        assert inside.wait(60)
        return model(hidden, text)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(taps.run, model, ["joint"], here, select=select, stop=False)
        while not model.joint._forward_hooks:
            time.sleep(0.001)
        other = pool.submit(taps.run, model, ["joint"], there, select=lambda output, *_: output[0])
        (expected,) = other.result(60)
        off.set()
        assert torch.equal(one.result(60)[0], expected)
    assert hooks(model) == []


# --- wrappers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_pass_is_not_left_early_where_a_module_beside_the_path_is_sharded(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = TwoBlocks()
    assert not taps.gathered(model)
    fully_shard(model.shared, mesh=init_device_mesh("cpu", (1,)))
    assert taps.gathered(model)
    assert not taps.may_stop(model, ["joint"])


def test_nothing_is_gathered_where_a_model_is_offloaded():
    model = TwoBlocks()
    model.joint._hf_hook = None  # accelerate's mark
    assert not taps.may_stop(model, ["joint"])
    assert not taps.gathered(model)


def fsdp(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def lora(**options):
    def wrap(model):
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["joint.linear"]), **options)

    return wrap


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = [
    lambda model: model, compiled, fsdp, lora(), lora(mixed=True), nn.DataParallel, nn.parallel.DistributedDataParallel,
    lambda model: compiled(nn.parallel.DistributedDataParallel(lora()(model))), lambda model: fsdp(fsdp(model)),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of FSDP on one process
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_module_inside_every_wrapper_is_found(group, wrap):
    model = TwoBlocks()
    assert taps.unwrap(wrap(model)) is model


def test_the_lora_layers_stay_in_what_is_unwrapped():
    model = TwoBlocks()
    wrapped = lora()(model)
    assert "lora_A" in taps.unwrap(wrapped).joint.linear._modules
    hidden = torch.randn(2, 3)
    (feature,) = taps.run(model, ["joint"], lambda: wrapped(hidden, hidden + 1), select=lambda output, *_: output[0])
    assert torch.equal(feature, model.joint(hidden, hidden)[0])


@pytest.mark.parametrize("name", ["module", "model", "base_model", "_module"])
def test_a_model_that_holds_another_under_a_wrappers_name_is_no_wrapper(name):
    model = nn.Module()
    model.add_module(name, TwoBlocks())
    assert taps.unwrap(model) is model


def test_a_layer_is_found_through_a_compiled_part():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 3))
    inner = model[0][1]
    model[0] = torch.compile(model[0], backend="eager")
    assert taps.layer(model, "0.1") is inner
