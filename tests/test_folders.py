"""Folders of pictures: their captions and classes, what is left out, what is refused."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from killing import child
from PIL import Image

from perceptual_diffusion.cli import folders
from perceptual_diffusion.cli._errors import UserError


def picture(path, size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


@pytest.fixture
def root(tmp_path):
    """Two pictures, one in a subfolder."""
    folder = tmp_path / "data"
    picture(folder / "a.png")
    picture(folder / "more/b.jpg")
    return folder


def jsonl(root, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (root / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines))


def captions(root):
    found = folders.read(root, "captions")
    return {item.path.relative_to(root).as_posix(): item.text for item in found.items}, found.left_out


def test_captions_of_jsonl_csv_and_text_files_are_the_same(root):
    jsonl(root, {"file_name": "a.png", "text": "one, two"}, {"file_name": "more/b.jpg", "text": "drei"})
    expected = {"a.png": "one, two", "more/b.jpg": "drei"}, ()
    assert captions(root) == expected
    (root / "metadata.jsonl").unlink()
    (root / "metadata.csv").write_text('text,file_name\n"one, two",a.png\ndrei,more/b.jpg\n', encoding="utf-8-sig")
    assert captions(root) == expected
    (root / "metadata.csv").unlink()
    (root / "a.txt").write_text("one, two\n")
    (root / "more/b.txt").write_text("drei")
    assert captions(root) == expected


def test_pictures_without_a_caption_are_left_out_and_named(root):
    jsonl(root, {"file_name": "a.png", "text": "one"})
    assert captions(root) == ({"a.png": "one"}, ("more/b.jpg: no caption",))
    (root / "metadata.jsonl").unlink()
    (root / "more/b.txt").write_text("two")
    assert captions(root) == ({"more/b.jpg": "two"}, ("a.png: no caption",))


def test_classes_are_the_subfolders_numbers_in_their_order(tmp_path):
    for name in ("10", "9", "cat"):
        picture(tmp_path / name / "x.png")
    picture(tmp_path / "bare.png")
    found = folders.read(tmp_path, "classes")
    assert found.classes == ("9", "10", "cat")
    assert {item.path.parent.name: item.label for item in found.items} == {"9": 0, "10": 1, "cat": 2}
    assert found.left_out == ("bare.png: not in the subfolder of a class",)


def test_broken_pictures_are_named_with_the_reason(root):
    (root / "c.png").write_bytes(b"")
    (root / "d.png").write_bytes((root / "a.png").read_bytes()[:50])
    (root / "e.png").mkdir()
    (root / ".hidden.png").write_bytes(b"")
    found = folders.read(root, "nothing")
    assert [item.path.name for item in found.items] == ["a.png", "b.jpg"]
    assert [name.split(":")[0] for name in found.left_out] == ["c.png", "d.png"]
    assert all(len(name.split(": ", 1)[1]) > 3 for name in found.left_out)
    for name in ("a.png", "more/b.jpg"):
        (root / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"no picture in .* can be used; the first of 4: a.png: "):
        folders.read(root, "nothing")


def test_a_picture_is_upright_on_white_and_has_eight_bits(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert folders.open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("I;16", (2, 2), 257 * 100).save(tmp_path / "deep.png")
    assert folders.open_picture(tmp_path / "deep.png").getpixel((0, 0)) == (100, 100, 100)
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    assert folders.open_picture(tmp_path / "turned.jpg").size == (2, 4)


GOOD = {"file_name": "a.png", "text": "one"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((GOOD, {"file_name": "none.png", "text": "x"}), "metadata.jsonl:2: there is no picture 'none.png'"),
        ((GOOD, "", {"file_name": "a.png"}), "metadata.jsonl:3: `text` is missing"),
        (({"text": "x"},), "metadata.jsonl:1: `file_name` is missing"),
        (({"file_name": "a.png", "text": 3},), ":1: `text` is missing or no text"),
        ((GOOD, "{"), ":2: this is no JSON"),
        (("[]",), ":1: this is no JSON object"),
        (({"file_name": "../x.png", "text": "x"},), "expected the name of a picture within the folder"),
        (({"file_name": "more/../a.png", "text": "x"},), "within the folder"),
        (({"file_name": "/etc/a.png", "text": "x"},), "within the folder"),
        (({"file_name": "C:/a.png", "text": "x"},), "within the folder"),
        (({"file_name": "", "text": "x"},), "within the folder"),
        (({"file_name": "a\0.png", "text": "x"},), "within the folder"),
        (({"file_name": "more", "text": "x"},), "there is no picture 'more'"),
    ],
)
def test_a_wrong_line_of_captions_is_named(root, rows, message):
    jsonl(root, *rows)
    with pytest.raises(UserError, match=message):
        folders.read(root, "captions")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,caption\na.png,x\n", "metadata.csv:1: there is no column 'text'"),
        ("", "metadata.csv:1: there is no column 'file_name'"),
        ("file_name,text\na.png,one, two\n", "metadata.csv:2: this row has more fields than columns"),
        ("file_name,text\na.png\n", "metadata.csv:2: `text` is missing"),
        ('file_name,text\na.png,"one\n', "metadata.csv:2: this is no CSV"),
    ],
)
def test_a_wrong_row_of_captions_is_named(root, text, message):
    (root / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        folders.read(root, "captions")


def test_caption_files_that_contradict_or_cannot_be_read_are_refused(root):
    (root / "metadata.csv").write_bytes(b"\xff\xff")
    with pytest.raises(UserError, match="it is not UTF-8"):
        folders.read(root, "captions")
    jsonl(root, GOOD)
    with pytest.raises(UserError, match=r"holds both metadata.jsonl and metadata.csv"):
        folders.read(root, "captions")


def test_links_that_leave_the_folder_are_refused(root, tmp_path):
    picture(tmp_path / "outside/secret.png")
    link = root / "link.png"
    link.symlink_to(root / "a.png")
    assert len(folders.read(root, "nothing").items) == 3
    for target in (tmp_path / "outside/secret.png", tmp_path / "outside"):
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(UserError, match=r"link.png' is a link out of the folder, or to a folder"):
            folders.read(root, "nothing")


def test_a_folder_without_pictures_or_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for path, message in [
        (tmp_path, "holds no picture"),
        (tmp_path / "none", "there is no folder"),
        (tmp_path / "a.txt", "there is no folder"),
    ]:
        with pytest.raises(UserError, match=message):
            folders.read(path, "nothing")


def test_large_pictures_are_decoded_one_at_a_time_without_copies(tmp_path):
    """Pillow has 4 bytes for a pixel of RGB; one picture is decoded while the one before goes away."""
    Image.new("L", (6000, 6000)).save(tmp_path / "a.png")
    for name in "bcd":
        shutil.copy(tmp_path / "a.png", tmp_path / f"{name}.png")

    def grown():
        before = peak()
        assert len(folders.read(tmp_path, "nothing").items) == 4
        print((peak() - before) / 36e6)

    ended = child(grown)
    assert ended.code == 0, ended.said
    assert float(ended.said) < 10.5


def peak():
    """The most memory that this process had so far."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_a_picture_on_white_is_what_pillows_own_compositing_gives(tmp_path):
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    clear = Image.fromarray(np.stack([value, value, value, alpha], -1).astype(np.uint8))
    clear.save(tmp_path / "clear.png")
    expected = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    assert folders.open_picture(tmp_path / "clear.png").tobytes() == expected.tobytes()


def test_a_file_that_is_larger_than_any_picture_is_not_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.truncate(tmp_path / "a.png", 2**30 + 1)
    assert "at most 1073741824 are read" in folders.find_broken([tmp_path / "a.png"])[tmp_path / "a.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_a_pipe_among_the_pictures_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="no regular file"):
        folders.open_picture(tmp_path / "pipe.png")
    assert list(folders.find_broken([tmp_path / "pipe.png"]).values()) == ["no regular file"]
