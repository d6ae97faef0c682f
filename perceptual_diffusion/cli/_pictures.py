"""Open a picture of somebody else's: in a few formats, of a size that fits into memory, whatever its name says."""

import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""What is decoded. Pillow goes by a file's content, not its name, and would hand PostScript to a program of its own."""
PIXELS = 89_478_485
"""The largest picture, Pillow's own limit for a warning. One takes up to 1.1 GB while it is decoded: Pillow has 4 bytes per pixel."""
LARGE = 2**24
"""Pictures of more pixels are decoded one at a time, also where there are several threads."""
BYTES = 2**30
"""The largest file: that of the largest picture without any compression, and some more."""
_alone = threading.Lock()


def open_picture(path: Path) -> Any:
    """Open a picture as RGB, upright, on white, with 8 bits per pixel.

    Raises:
        OSError: it is broken, too large, of another format, or no regular file.
    """
    with quiet():
        return decode(path)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Pillow's warnings off the screen, on metadata and sizes. It is of the whole process: enter it before threads are made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decode(path: Path) -> Any:
    """Do what `open_picture` does; its caller is `quiet`."""
    from PIL import Image, ImageOps

    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise OSError("no regular file")
        if status.st_size > BYTES:
            raise OSError(f"it has {status.st_size} bytes, and at most {BYTES} are read")
        with Image.open(path, formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > PIXELS:
                raise OSError(f"{image.width} x {image.height} pixels, and at most {PIXELS} are decoded")
            with _alone if pixels > LARGE else nullcontext():
                ImageOps.exif_transpose(image, in_place=True)
                upright = eight_bit(image)
                if not upright.has_transparency_data:
                    return upright.convert("RGB")
                clear = upright.convert("RGBA")
                white = Image.new("RGB", clear.size, "white")
                white.paste(clear, mask=clear)
                return white
    except OSError:
        raise
    except Exception as error:  # Pillow's decoders have many, and a size beyond all bounds has its own
        raise OSError(str(error) or type(error).__name__) from error


def eight_bit(image: Any) -> Any:
    """Give a picture of 16 bits per pixel 8, which Pillow's own conversion would clip to white."""
    return image.point(lambda value: value / 257).convert("L") if image.mode.startswith("I") else image
