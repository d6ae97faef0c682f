"""Open a picture of somebody else's: in a few formats, of a size that fits into memory, whatever its name says."""

import stat
import warnings
from pathlib import Path
from typing import Any

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""What is decoded. Pillow goes by a file's content, not its name, and would hand PostScript to a program of its own."""
PIXELS = 89_478_485
"""The largest picture, Pillow's own limit for a warning: 256 MiB as RGB."""


def open_picture(path: Path) -> Any:
    """Open a picture as RGB, upright, on white, with 8 bits per pixel.

    Raises:
        OSError: it is broken, too large, of another format, or no regular file.
    """
    from PIL import Image, ImageOps

    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise OSError("no regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on metadata of a picture, and on its size
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > PIXELS:
                    raise OSError(f"{image.width} x {image.height} pixels, and at most {PIXELS} are decoded")
                rgba = eight_bit(ImageOps.exif_transpose(image)).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    except OSError:
        raise
    except Exception as error:  # Pillow's decoders have many, and a size beyond all bounds has its own
        raise OSError(str(error) or type(error).__name__) from error


def eight_bit(image: Any) -> Any:
    """Give a picture of 16 bits per pixel 8, which Pillow's own conversion would clip to white."""
    return image.point(lambda value: value / 257).convert("L") if image.mode.startswith("I") else image
