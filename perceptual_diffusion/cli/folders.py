"""Folders of pictures for training: with captions, with classes, or bare.

Captions are in metadata.jsonl or metadata.csv (file_name, text: the layout of the `imagefolder` of Hugging Face's
datasets), or in a .txt beside each picture; classes are subfolders. What cannot be used is left out, counted and named.
"""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from perceptual_diffusion.cli import _paths
from perceptual_diffusion.cli._errors import UserError
from perceptual_diffusion.cli._pictures import SUFFIXES, decode, open_picture, quiet  # noqa: F401  (for the examples)

Wanted = Literal["nothing", "classes", "captions"]
METADATA = ("metadata.jsonl", "metadata.csv")
HINT = "Add a metadata.jsonl with a line such as {\"file_name\": \"a.png\", \"text\": \"a cat\"} for each picture, or a .txt beside each."  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Item:
    """A picture, the SHA-256 of its file, and its caption or its class if that was asked for."""

    path: Path
    digest: str = ""
    text: str = ""
    label: int = 0


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What a folder holds.

    Attributes:
        items: the pictures, in the order of the metadata, or sorted by name.
        classes: the names of the classes.
        left_out: the files that cannot be used: "name: why".
    """

    items: tuple[Item, ...]
    classes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def read(root: Path, wanted: Wanted, *, progress: Callable[[], None] | None = None) -> Folder:
    """Read a folder, and decode each of its pictures once to find the broken ones.

    Args:
        root: the folder.
        wanted: what belongs to a picture.
        progress: called after each picture.

    Raises:
        UserError: the folder, its metadata or the layout cannot be used.
    """
    paths = pictures(root)
    left_out: list[str] = []
    classes: tuple[str, ...] = ()
    if wanted == "captions":
        items, left_out = _captioned(root, paths)
    elif wanted == "classes":
        items, classes, left_out = _classed(root, paths)
    else:
        items = [Item(path=path) for path in paths]
    digests, broken = _look([item.path for item in items], progress)
    left_out += [f"{path.relative_to(root)}: {why}" for path, why in broken.items()]
    good = tuple(replace(item, digest=digests[item.path]) for item in items if item.path not in broken)
    if not good:
        raise UserError(f"no picture in {str(root)!r} can be used; the first of {len(left_out)}: {left_out[0]}.")
    return Folder(items=good, classes=classes, left_out=tuple(left_out))


def pictures(root: Path) -> list[Path]:
    """Give the picture files in a folder and its subfolders, sorted.

    Raises:
        UserError: it is no folder, cannot be read, holds no picture, or a link in it leads out of it.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {str(root)!r}. Give a folder with pictures in it.")
    found = sorted(path for path in _walk(root) if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(
            f"the folder {str(root)!r} holds no picture ({', '.join(SUFFIXES)}). Give a folder with pictures in it."
        )
    return found


def find_broken(paths: list[Path], progress: Callable[[], None] | None = None) -> dict[Path, str]:
    """Decode every picture, and give those that are broken with the reason."""
    return _look(paths, progress)[1]


def _look(paths: list[Path], progress: Callable[[], None] | None) -> tuple[dict[Path, str], dict[Path, str]]:
    """Decode every picture: the digests of the good ones, and of the broken ones the reason."""

    def look(path: Path) -> tuple[Path, str, str]:
        try:
            decode(path)
            with path.open("rb") as file:
                return path, hashlib.file_digest(file, "sha256").hexdigest(), ""
        except OSError as error:
            return path, "", str(error).replace(str(path), path.name) or type(error).__name__

    good, broken = dict[Path, str](), dict[Path, str]()
    with quiet(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, digest, why in pool.map(look, dict.fromkeys(paths)):
            (broken if why else good)[path] = why or digest
            if progress is not None:
                progress()
    return good, broken


def _walk(root: Path) -> Iterator[Path]:
    """The files of a folder, hidden ones left out."""

    def fail(error: OSError) -> None:
        raise UserError(
            f"cannot read the folder {str(error.filename)!r}: {error.strerror}. Give another folder."
        ) from error

    inside = root.resolve()
    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_symlink() and (name in folders or not path.resolve().is_relative_to(inside)):
                raise UserError(
                    f"{str(path)!r} is a link out of the folder, or to a folder. Put the files themselves there."
                )
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _captioned(root: Path, paths: list[Path]) -> tuple[list[Item], list[str]]:
    """The pictures with their captions, and those without one."""
    listed = [root / name for name in METADATA if (root / name).exists()]
    if len(listed) > 1:
        raise UserError(f"{str(root)!r} holds both {' and '.join(METADATA)}. Keep one of them.")
    if listed:
        items = list(_metadata(root, listed[0]))
    else:
        beside = {path: path.with_suffix(".txt") for path in paths}
        items = [Item(path=path, text=_text(file).strip()) for path, file in beside.items() if file.is_file()]
    if not items:
        raise UserError(f"the pictures in {str(root)!r} have no captions, and this model needs them. {HINT}")
    named = {item.path for item in items}
    return items, [f"{path.relative_to(root)}: no caption" for path in paths if path not in named]


def _classed(root: Path, paths: list[Path]) -> tuple[list[Item], tuple[str, ...], list[str]]:
    """The pictures with their classes, the names of the classes, and the pictures outside of subfolders."""
    names = {path: path.relative_to(root).parts[0] for path in paths if path.parent != root}
    classes = tuple(sorted(set(names.values()), key=lambda n: (not n.isdecimal(), int(n) if n.isdecimal() else 0, n)))
    if not classes:
        raise UserError(
            f"{str(root)!r} holds no subfolders with pictures, and this model needs classes. Put each class into a subfolder."
        )
    items = [Item(path=path, label=classes.index(name)) for path, name in names.items()]
    return items, classes, [f"{path.name}: not in the subfolder of a class" for path in paths if path not in names]


def _metadata(root: Path, file: Path) -> Iterator[Item]:
    """The pictures that a metadata file names."""
    if file.is_symlink():
        raise UserError(f"{str(file)!r} is a link. Put the file itself there.")
    for line, row in _lines(file):
        place = f"{file}:{line}: "
        for column in ("file_name", "text"):
            if not isinstance(row.get(column), str):
                raise UserError(f"{place}`{column}` is missing or no text. Each picture needs `file_name` and `text`.")
        name = row["file_name"]
        parts = PurePosixPath(name).parts
        if (
            not parts
            or ".." in parts
            or PurePosixPath(name).is_absolute()
            or PureWindowsPath(name).drive
            or "\0" in name
        ):
            raise UserError(f"{place}`file_name` is {name!r}, expected the name of a picture within the folder.")
        path = root / name
        if not path.is_file():
            raise UserError(f"{place}there is no picture {name!r}. Mend the name, or remove the line.")
        if not path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{place}{name!r} is a link out of the folder. Put the picture itself there.")
        yield Item(path=path, text=row["text"].strip())


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of a metadata file."""
    text = _text(file)
    if file.suffix == ".csv":
        rows = csv.DictReader(text.splitlines(keepends=True), strict=True)
        try:
            missing = [name for name in ("file_name", "text") if name not in (rows.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{file}:1: there is no column {missing[0]!r}. The first line must name `file_name` and `text`."
                )
            for row in rows:
                if None in row:
                    raise UserError(
                        f"{file}:{rows.line_num}: this row has more fields than columns. Put quotes around a text with commas."
                    )
                yield rows.line_num, row
        except csv.Error as error:
            raise UserError(f"{file}:{rows.reader.line_num}: this is no CSV: {error}.") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number}: this is no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise UserError(
                f'{file}:{number}: this is no JSON object. Write a line such as {{"file_name": "a.png", "text": "a cat"}}.'
            )
        yield number, row


def _text(file: Path) -> str:
    try:
        return _paths.text(file, _paths.LARGEST_TABLE, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{str(file)!r} cannot be read: {reason}. Save it again as UTF-8.") from error
