"""Check that the sdist, and the wheel that `python -m build` makes from it, hold every file of the package."""

import sys
import tarfile
import zipfile
from pathlib import Path

NEEDED = (
    "perceptual_diffusion/__init__.py",
    "perceptual_diffusion/py.typed",
    "perceptual_diffusion/adapters/__init__.py",
    "perceptual_diffusion/adapters/diffusers.py",
    "perceptual_diffusion/adapters/schedulers.py",
    "perceptual_diffusion/cli/demo.py",
    "perceptual_diffusion/assets/base/config.json",
    "perceptual_diffusion/assets/base/diffusion_pytorch_model.safetensors",
    "perceptual_diffusion/assets/efflite0/NOTICE.txt",
    "perceptual_diffusion/assets/efflite0/classifier.safetensors",
    "perceptual_diffusion/assets/efflite0/model.safetensors",
    "perceptual_diffusion/assets/emoji/NOTICE.txt",
    "perceptual_diffusion/assets/emoji/OFL.txt",
    "perceptual_diffusion/assets/emoji/atlas.webp",
    "perceptual_diffusion/assets/emoji/emoji.json",
)


def main() -> None:
    dist = Path(sys.argv[1])
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        in_sdist = {name.split("/", 1)[-1] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())  # `python -m build` makes the wheel from the sdist
    tree = {str(p) for p in Path("perceptual_diffusion").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    problems = [
        f"{where} lacks {name}"
        for where, names in (("sdist", in_sdist), ("wheel", in_wheel))
        for name in sorted({*NEEDED, *tree} - names)
    ]
    problems += [f"wheel holds {name}" for name in in_wheel if name.startswith(("adapters/", "tests/", "examples/"))]
    if problems:
        sys.exit("\n".join(problems))
    print(f"sdist and wheel hold all {len(tree)} files of the package; wheel {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
