"""The packaged emoji and the loaders of pictures."""

import gzip
import json
from importlib import resources

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from perceptual_diffusion.cli import datasets
from perceptual_diffusion.cli._errors import UserError

ASSETS = resources.files("perceptual_diffusion") / "assets"


def test_emoji_are_1890_pictures_with_captions_and_nine_categories():
    split = datasets.load("emoji")
    assert len(split.train) + len(split.held_out) == 1890
    assert len(split.held_out) == 188
    assert len(split.train.classes) == 9
    assert split.train.images.shape[1:] == (3, 32, 32)
    assert split.train.images.dtype == torch.uint8
    assert set(split.train.labels.tolist()) == set(range(9))
    captions = [row["caption"] for row in json.loads((ASSETS / "emoji/emoji.json").read_text("utf-8"))["emoji"]]
    assert len(captions) == 1890
    assert "grinning face" in captions


def test_every_emoji_is_a_picture_of_its_own_place_in_the_atlas():
    """The first emoji is yellow in the middle and white in the corner: rows, columns and channels are in order."""
    row = json.loads((ASSETS / "emoji/emoji.json").read_text("utf-8"))["emoji"][0]
    picture = datasets.load("emoji").train.images[0].float()
    assert row["caption"] == "grinning face"
    assert picture[:, 0, 0].tolist() == [255, 255, 255]
    red, green, blue = picture[:, 6, 16].tolist()
    assert red > 200
    assert green > 150
    assert blue < 120
    assert all(x.float().std() > 0 for x in datasets.load("emoji").train.images)


def test_no_held_out_picture_is_in_the_training_set():
    split = datasets.load("emoji")
    train = {picture.numpy().tobytes() for picture in split.train.images}
    assert not any(picture.numpy().tobytes() in train for picture in split.held_out.images)


def test_flags_and_symbols_are_never_mirrored():
    train = datasets.load("emoji").train
    kept = torch.tensor([train.classes[i] in ("Flags", "Symbols") for i in train.labels])
    assert torch.equal(train.mirror, ~kept)


def test_licence_notices_lie_beside_what_they_cover():
    assert "Noto" in (ASSETS / "emoji/NOTICE.txt").read_text()
    assert "SIL Open Font License" in (ASSETS / "emoji/OFL.txt").read_text()
    assert "Apache" in (ASSETS / "efflite0/NOTICE.txt").read_text()


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_to_images_inverts_to_model_exactly(batch, height, width):
    images = torch.randint(0, 256, (batch, 3, 2 * height, 2 * width), dtype=torch.uint8)
    latents = datasets.to_model(images)
    assert latents.shape == (batch, 12, height, width)
    assert torch.equal(datasets.to_images(latents), images)


def test_digits_have_ten_classes():
    split = datasets.load("digits")
    assert len(split.train) + len(split.held_out) == 1797
    assert split.train.classes == tuple("0123456789")
    assert split.train.images.float().mean() > 20


def _write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 20), ("t10k", 10)):
        _write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        _write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))
    monkeypatch.setattr(datasets, "FASHION_MNIST", tmp_path)
    return tmp_path


def test_fashion_mnist_is_padded_to_32_pixels(fashion):
    split = datasets.load("fashion-mnist")
    assert len(split.train) == 20
    assert len(split.held_out) == 10
    assert split.train.images.shape == (20, 3, 32, 32)
    assert split.train.images[:, :, :2].max() == 0
    assert split.train.labels.tolist() == [i % 10 for i in range(20)]


def test_a_damaged_fashion_mnist_file_is_named(fashion):
    file = fashion / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="Fashion-MNIST"):
        datasets.load("fashion-mnist")
    _write_idx(file, np.zeros((3, 28, 28), np.uint8))
    raw = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress(raw[:-5]))
    with pytest.raises(UserError, match=r"expected 2352 .* damaged"):
        datasets.load("fashion-mnist")


def _pictures(folder, count, colour):
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (40, 60), colour).save(folder / f"{index}.png")


def test_a_folder_has_a_class_per_subfolder(tmp_path):
    _pictures(tmp_path / "red", 6, (255, 0, 0))
    _pictures(tmp_path / "blue", 6, (0, 0, 255))
    split = datasets.load(str(tmp_path))
    assert split.train.classes == ("blue", "red")
    assert len(split.train) == 11
    for image, label in zip(split.train.images, split.train.labels, strict=True):
        assert image[:, 16, 16].tolist() == ([255, 0, 0] if split.train.classes[label] == "red" else [0, 0, 255])


def test_transparent_pictures_lie_on_white(tmp_path):
    for index in range(4):
        Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / f"{index}.png")
    assert datasets.load(str(tmp_path)).train.images.min() == 255


def test_an_empty_or_unreadable_folder_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="holds no picture"):
        datasets.load(str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"not a picture")
    (tmp_path / "b.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"0 could be read .* a\.png"):
        datasets.load(str(tmp_path))


def test_unreadable_pictures_are_counted_and_sixteen_bits_are_scaled(tmp_path):
    grey = np.full((32, 32), 40000, np.uint16)
    for index in range(5):
        Image.fromarray(grey).save(tmp_path / f"{index}.png")
    (tmp_path / "x.png").write_bytes(b"not a picture")
    split = datasets.load(str(tmp_path))
    assert split.unreadable == 1
    assert split.train.images.unique().tolist() == [40000 // 257]


def test_too_few_pictures_are_refused(tmp_path):
    _pictures(tmp_path / "one", 3, (1, 2, 3))
    with pytest.raises(UserError, match="at least 4 are needed"):
        datasets.load(str(tmp_path))


def test_an_unknown_dataset_lists_the_known_ones():
    with pytest.raises(UserError, match="'emoji', 'digits', 'fashion-mnist', or a folder"):
        datasets.load("no-such-thing")
