"""`perceptual-diffusion evaluate`: the numbers against known values, what is said beside them, what is refused."""

import json
import math
import shutil

import pipelines
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from perceptual_diffusion.cli import datasets, inception, metrics
from perceptual_diffusion.cli._app import app

pytestmark = pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
QUICK = ("--steps", "1", "--device", "cpu")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def facts(*arguments):
    result = invoke("evaluate", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def values(found):
    return {name: row["value"] for name, row in found["metrics"].items()}


def write(folder, images, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(images):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{start + index:03d}.png")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Sixteen emoji, sixteen others, and the first under noise of two strengths."""
    root = tmp_path_factory.mktemp("sets")
    images = datasets.load("emoji").train.images[:320:10]
    one, other = images[:16], images[16:]
    noise = torch.randn(one.shape, generator=torch.Generator().manual_seed(0))
    made = {"one": one, "other": other}
    made |= {f"noisy{s}": (one + s * noise).clamp(0, 255).to(torch.uint8) for s in (20, 80)}
    return {name: write(root / name, given) for name, given in made.items()}


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_a_set_does_not_differ_from_itself(sets):
    given = facts(sets["one"], sets["one"])
    found = values(given)
    assert abs(found["FD-EffLite0"]) < 0.1
    assert found["KID-EffLite0"] < 0  # the estimate is unbiased of independent sets only, and so this is said:
    assert any("pictures in both A and B: 16. KID is the lower" in line for line in given["warnings"])
    assert found["precision-EffLite0"] == found["recall-EffLite0"] == 1
    assert not any("in both" in line for line in facts(sets["one"], sets["noisy20"])["warnings"])


def test_distances_grow_with_the_difference(sets):
    rows = [values(facts(sets[name], sets["one"])) for name in ("one", "noisy20", "noisy80")]
    for metric in ("FD-EffLite0", "KID-EffLite0"):
        assert rows[0][metric] < rows[1][metric] < rows[2][metric]
    assert rows[0]["precision-EffLite0"] >= rows[1]["precision-EffLite0"] > rows[2]["precision-EffLite0"]


def test_a_shift_of_gaussian_features_is_their_fréchet_distance():
    real = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))
    shift = torch.linspace(0, 1, 12)
    found = metrics.compare(real, real + shift, network="x")
    assert found["FD-x"] == pytest.approx(float(shift.square().sum()), rel=1e-4)


def kid(x, y):
    """The unbiased squared MMD with the kernel (x·y / D + 1)³, in float64 (Bińkowski et al., arXiv 1801.01401)."""
    x, y = x.double(), y.double()
    kernel = lambda a, b: (a @ b.T / x.shape[1] + 1) ** 3  # noqa: E731
    within = sum((kernel(z, z).sum() - kernel(z, z).diagonal().sum()) / (len(z) * (len(z) - 1)) for z in (x, y))
    return float(within - 2 * kernel(x, y).mean())


def test_kid_is_the_formula_on_its_subsets():
    generator = torch.Generator().manual_seed(1)
    real, fake = torch.randn(20, 6, generator=generator), 0.5 + torch.randn(24, 6, generator=generator)
    found = metrics.compare(real, fake, seed=3)
    torch.manual_seed(3)
    scores = torch.tensor([kid(real[torch.randperm(20)[:10]], fake[torch.randperm(24)[:10]]) for _ in range(50)])
    assert metrics.subset_size(20, 24) == 10
    assert found["KID-EffLite0"] == pytest.approx(1000 * float(scores.mean()), rel=1e-4)
    assert found["KID-EffLite0 ±"] == pytest.approx(1000 * float(scores.std(correction=0)), rel=1e-4)


def test_precision_and_recall_of_points_drawn_by_hand():
    # radii to the nearest other: real 1, 1, 3 and fake 0.5, 0.5, 99
    real = torch.tensor([[0.0, 0.0], [1.0, 0.0], [4.0, 0.0]])
    fake = torch.tensor([[0.5, 0.5], [0.5, 1.0], [0.0, 100.0]])
    # within a real ball: the first (√0.5 < 1), the second (√1.25 < 3 of (4, 0)? no, it is 3.6 away; > 1: no), the third not
    # within a fake ball: (0, 0), (1, 0) and (4, 0) in that of (0, 100)? its radius is √(0.25 + 99²) = 99.001: no
    assert metrics.precision_recall(real, fake, neighbours=1) == pytest.approx((1 / 3, 0.0))
    assert metrics.precision_recall(fake, real, neighbours=1) == pytest.approx((0.0, 1 / 3))
    assert metrics.precision_recall(real, real + torch.tensor([0.1, 0.0]), neighbours=1) == (1.0, 1.0)


@pytest.mark.parametrize("rows", [1000, 7])
def test_precision_and_recall_are_those_of_torch_fidelity(rows):
    from torch_fidelity.metric_prc import prc_features_to_metric

    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(60, 5, generator=generator), 0.6 * torch.randn(50, 5, generator=generator) + 0.3
    wanted = prc_features_to_metric(fake, real, verbose=False)
    found = metrics.precision_recall(real, fake, rows=rows)
    assert found == pytest.approx((wanted["precision"], wanted["recall"]))
    assert found[0] != found[1]


def test_the_classifier_score_is_one_without_certainty_and_the_number_of_classes_at_most():
    from torch_fidelity.metric_isc import isc_features_to_metric

    assert metrics.classifier_score(torch.zeros(6, 4)) == pytest.approx(1)
    assert metrics.classifier_score(100 * torch.eye(4)) == pytest.approx(4)
    assert metrics.classifier_score(100 * torch.eye(4)[:1].expand(5, 4)) == pytest.approx(1)
    logits = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    wanted = isc_features_to_metric(logits, splits=1)["inception_score_mean"]
    assert metrics.classifier_score(logits) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("name", "palace_or_daisy"), [("china.jpg", 698), ("flower.jpg", 985)])
def test_the_packaged_classifier_knows_what_is_on_a_photograph(name, palace_or_daisy):
    from sklearn.datasets import load_sample_image

    picture = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None]
    logits = metrics.classify(metrics.features(metrics.Network(224), picture))
    assert logits.shape == (1, 1000)
    assert palace_or_daisy in logits[0].topk(3).indices


# --- what is said beside them -----------------------------------------------------------------------------------------


def test_every_number_has_its_n_and_its_network_and_few_pictures_are_warned_of(sets):
    found = facts(sets["one"], sets["other"])
    assert {name.split("-")[1] for name in found["metrics"]} == {"EffLite0"}
    assert all(row["n"] == [16, 16] for row in found["metrics"].values())
    assert found["network"] == {"name": "EffLite0", "what": "EfficientNet-Lite0, trained on ImageNet", "resolution": 64}
    assert [line.split(":")[0] for line in found["warnings"]] == ["N is below 1000"]
    result = invoke("evaluate", sets["one"], sets["other"])
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if "EffLite0 " in line]
    assert len(lines) == 5
    assert all("16, 16" in line for line in lines)
    assert "FID" not in result.stdout
    assert "note: N is below 1000" in result.stdout


def test_the_same_command_prints_the_same(sets):
    arguments = (sets["noisy20"], sets["other"], "--half-error", "--train", sets["one"])
    assert facts(*arguments) == facts(*arguments)


def test_another_resolution_is_another_network(sets):
    found = facts(sets["one"], sets["other"], "--resolution", 48)
    assert set(found["metrics"]) == {f"{metric}-EffLite0@48" for metric in ("FD", "KID", "precision", "recall", "CS")}
    assert values(found)["FD-EffLite0@48"] != values(facts(sets["one"], sets["other"]))["FD-EffLite0"]


def test_unequal_sets_sizes_and_broken_pictures_are_said(tmp_path, sets):
    mixed = tmp_path / "mixed"
    shutil.copytree(sets["one"], mixed)
    Image.new("RGB", (40, 20), "red").save(mixed / "wide.png")
    (mixed / "broken.png").write_bytes(b"no picture")
    (mixed / "cut.png").write_bytes((mixed / "000.png").read_bytes()[:200])
    found = facts(mixed, sets["other"], "--train", mixed)
    assert found["a"]["n"] == 17
    assert found["a"]["sizes"] == ["32 x 32", "40 x 20"]
    assert [row.split(":")[0] for row in found["a"]["broken"]] == ["broken.png", "cut.png"]
    said = " ".join(found["warnings"])
    for words in ("N differs (17 and 16)", "the pictures differ in size; each was resized to 64 x 64", "2 files of A cannot be read", "2 files of train cannot be read and are left out: broken.png: "):  # fmt: skip
        assert words in said
    assert str(tmp_path) not in said


def test_pictures_of_other_sizes_keep_their_place_and_their_features(tmp_path, sets):
    """A picture is seen the same whatever stands beside it."""
    images = datasets.load("emoji").train.images[:8]
    small = write(tmp_path / "mixed", images)
    Image.new("RGB", (48, 48), "green").save(small / "0005.png")
    from perceptual_diffusion.cli.seeing import files, see
    from perceptual_diffusion.cli.training import Stop

    network = metrics.Network()
    seen = see(network, "A", files(small), Stop())
    green = torch.zeros(1, 3, 48, 48, dtype=torch.uint8)
    green[:, 1] = 128
    order = [path.name for path in files(small)].index("0005.png")
    torch.testing.assert_close(seen.features[order], metrics.features(network, green)[0], rtol=1e-4, atol=1e-4)
    rest = [i for i in range(9) if i != order]
    torch.testing.assert_close(seen.features[rest], metrics.features(network, images), rtol=1e-4, atol=1e-4)


def test_the_halves_of_the_real_set_show_the_error_of_sampling(sets):
    found = facts(sets["noisy80"], sets["one"], "--half-error")
    assert found["halves of b"].keys() == found["metrics"].keys()
    assert all(row["n"] == [8, 8] for row in found["halves of b"].values())
    assert "half of B against half" in invoke("evaluate", sets["noisy80"], sets["one"], "--half-error").stdout


def test_copies_of_training_pictures_are_found(tmp_path, sets):
    found = facts(sets["noisy20"], sets["other"], "--train", sets["one"])["train"]
    assert found["a"]["mean"] < 0.1 < found["b"]["mean"]
    assert found["n"] == found["a"]["n"] == 16
    assert facts(sets["one"], sets["other"], "--train", sets["one"])["train"].keys() == {"path", "n", "broken", "b"}
    copied = facts(shutil.copytree(sets["one"], tmp_path / "copy"), sets["other"], "--train", sets["one"])["train"]
    assert copied["a"]["mean"] == copied["a"]["least"] == pytest.approx(0, abs=1e-3)
    result = invoke("evaluate", sets["noisy20"], sets["other"], "--train", sets["one"])
    assert "A to the nearest of 16 training pictures: 0.0" in result.stdout


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_is_sampled_as_often_as_the_folder_has_pictures(tmp_path, sets):
    model = pipelines.write("ddpm", tmp_path / "model")
    found = facts(model, sets["one"], *QUICK, "--samples", tmp_path / "kept", "--seed", 4)
    assert found["a"]["n"] == found["a"]["samples"]["settings"]["n"] == 16
    record = json.loads((tmp_path / "kept" / "samples.json").read_text())
    assert [row["seed"] for row in record["pictures"]] == list(range(4, 20))
    again = facts(tmp_path / "kept", sets["one"], "--seed", 4)
    assert again["metrics"] == found["metrics"]
    assert facts(model, sets["one"], *QUICK, "--n", 9)["a"]["n"] == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "model"]
    result = invoke("evaluate", model, sets["one"], "--n", 7)
    assert result.exit_code == 2
    assert "--n is 7, and at least 8 pictures are needed" in result.stderr
    two = facts(model, model, *QUICK, "--n", 8)
    assert (two["a"]["n"], two["b"]["n"]) == (8, 8)
    assert abs(values(two)["FD-EffLite0"]) < 0.1


def test_a_model_is_given_the_classes_of_the_folder_in_proportion(tmp_path):
    model = pipelines.write("dit", tmp_path / "model")
    real = tmp_path / "real"
    for name, number in (("2", 3), ("7", 9)):
        write(real / name, datasets.load("emoji").train.images[:number])
    facts(model, real, *QUICK, "--samples", tmp_path / "all")
    facts(model, real, *QUICK, "--samples", tmp_path / "few", "--n", 8)
    facts(model, real, *QUICK, "--samples", tmp_path / "own", "--n", 8, "--class", 5)
    asked = {
        name: [row["class"] for row in json.loads((tmp_path / name / "samples.json").read_text())["pictures"]]
        for name in ("all", "few", "own")
    }
    assert asked == {"all": [2] * 3 + [7] * 9, "few": [2] * 2 + [7] * 6, "own": [5] * 8}


def test_a_grid_is_no_sample_and_a_comparison_is_two_sets(tmp_path, sets):
    model = pipelines.write("ddpm", tmp_path / "model")
    options = ("--n", 8, "--steps", 1)
    assert invoke("sample", model, "--out", tmp_path / "out", "--grid", *options).exit_code == 0
    assert facts(tmp_path / "out", sets["one"])["a"]["n"] == 8
    assert invoke("sample", model, "--out", tmp_path / "two", "--compare", model, *options).exit_code == 0
    result = invoke("evaluate", tmp_path / "two", sets["one"])
    assert result.exit_code == 2
    assert f"holds the samples of two models. Give one of {tmp_path / 'two' / 'model'}" in result.stderr
    assert facts(tmp_path / "two" / "model", tmp_path / "two" / "other")["a"]["n"] == 8


# --- what is refused --------------------------------------------------------------------------------------------------


def empty(folder):
    folder.mkdir()


def broken(folder):
    for index in range(9):
        write(folder, [])
        (folder / f"{index}.png").write_bytes(b"no picture")


def few(folder):
    write(folder, datasets.load("emoji").train.images[:7])


REFUSED = {
    "a folder that is not there": (lambda folder: None, [], "there is no folder"),
    "an empty folder": (empty, [], "holds no picture"),
    "a folder of broken files": (broken, [], "holds 0 pictures that can be read, and at least 8 are needed; the first that cannot be read: 0.png: "),
    "too few pictures": (few, [], "holds 7 pictures that can be read, and at least 8 are needed."),
    "an unknown network": (empty, ["--network", "vgg"], "--network is 'vgg', expected one of efflite0, inception."),
    "a resolution out of range": (empty, ["--resolution", 8], "--resolution is 8, expected a whole number from 32 to 1024."),
    "a resolution of Inception": (empty, ["--network", "inception", "--resolution", 128], "--resolution is given, but Inception"),
    "weights of the packaged network": (empty, ["--weights", "x.pth"], "--weights is given, but only --network inception needs it"),
    "samples to keep of none": (empty, ["--samples", "kept"], "--samples keeps the samples of one model, and none of A and B is one"),
    "weights that are not there": (empty, ["--network", "inception", "--weights", "no.pth"], "--weights 'no.pth' cannot be read: "),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_one_sentence(make, options, message, tmp_path, sets):
    make(tmp_path / "a")
    result = invoke("evaluate", tmp_path / "a", sets["one"], *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert message in result.stderr
    assert not (tmp_path / "kept").exists()


def test_a_folder_is_refused_before_a_model_is_sampled(tmp_path):
    model = pipelines.write("ddpm", tmp_path / "model")
    broken(tmp_path / "b")
    result = invoke("evaluate", model, tmp_path / "b", "--samples", tmp_path / "kept")
    assert result.exit_code == 2
    assert "sampling" not in result.stderr
    assert not (tmp_path / "kept").exists()


# --- the FID's own network --------------------------------------------------------------------------------------------


def test_other_weights_than_inceptions_are_no_fid(tmp_path, sets):
    (tmp_path / "own.pth").write_bytes(b"weights of my own")
    result = invoke("evaluate", sets["one"], sets["other"], "--network", "inception", "--weights", tmp_path / "own.pth")
    assert result.exit_code == 2
    assert "expected 6726825d, torch-fidelity's Inception: only its distance is the FID" in result.stderr


def test_without_a_network_inception_is_refused(tmp_path, sets, monkeypatch):
    import torch_fidelity.feature_extractor_inceptionv3 as theirs

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(theirs, "URL_INCEPTION_V3", "http://127.0.0.1:9/weights-6726825d.pth")
    result = invoke("evaluate", sets["one"], sets["other"], "--network", "inception")
    assert result.exit_code == 2
    assert "cannot be fetched: " in result.stderr
    assert "Give their file with --weights" in result.stderr
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


class Bomb:
    """Runs code when it is unpickled as whatever it is."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


def test_code_in_a_file_of_weights_is_not_run(tmp_path, monkeypatch):
    torch.save({"x": Bomb()}, tmp_path / "bomb.pth")
    monkeypatch.setattr(inception, "SHA256", "")
    with pytest.raises(Exception, match=r"Weights only load failed|weights_only"):
        inception.Inception(tmp_path / "bomb.pth")


@pytest.mark.slow
def test_only_inceptions_distance_is_called_fid(tmp_path, sets, monkeypatch):
    """With random weights in the place of the published ones: the numbers mean nothing, their names do."""
    import torch_fidelity.feature_extractor_inceptionv3 as theirs

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    made = {}
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: made)
    monkeypatch.setattr(
        theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: made.update(self.state_dict())
    )
    theirs.FeatureExtractorInceptionV3("inception", ["2048"])
    monkeypatch.undo()
    torch.save(made, tmp_path / "random.pth")
    monkeypatch.setattr(inception, "SHA256", "")
    found = facts(sets["one"], sets["noisy80"], "--network", "inception", "--weights", tmp_path / "random.pth")
    names = {"FID"} | {f"{metric}-Inception" for metric in ("KID", "precision", "recall", "CS")}
    assert found["metrics"].keys() == names
    assert all(math.isfinite(value) for value in values(found).values())
