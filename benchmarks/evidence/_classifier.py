"""FashionCNN: a small classifier of Fashion-MNIST, in whose features samples are compared.

`python benchmarks/evidence/_classifier.py` trains it (seed 0, minutes on one core) and writes its weights and what it reaches.
"""

import json
import platform
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "fashion_cnn.safetensors"
FEATURES = 128


class FashionCNN(nn.Module):
    """Grey uint8 pictures (B, 1, 32, 32), of which the border of 2 is cut off, to features (B, 128) and class logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers = (1, 32, 32, 64, 64, 128, FEATURES), []
        for index, (a, b) in enumerate(pairwise(widths)):
            stride = 2 if index in (1, 3) else 1
            layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = images[:, :, 2:-2, 2:-2].float() / 255
        features = self.body((pixels - 0.286) / 0.353).mean((2, 3))
        return features, self.head(features)


def read() -> FashionCNN:
    """Load the trained network, frozen."""
    from safetensors.torch import load_file

    network = FashionCNN()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval().requires_grad_(False)


def main(epochs: int = 5, batch: int = 128, seed: int = 0) -> None:
    """Train it, and measure it on the test set."""
    from _data import load
    from safetensors.torch import save_file
    from tqdm import trange

    torch.manual_seed(seed)
    data = load("fashion-mnist")
    network = FashionCNN().train()
    steps = epochs * (len(data.train) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in trange(steps, mininterval=5):
        index = torch.randint(0, len(data.train), (batch,))
        images = data.train.images[index]
        images = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, images.flip(-1), images)
        images = images.roll(tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))
        loss = nn.functional.cross_entropy(network(images)[1], data.train.labels[index], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        found = torch.cat([network(part)[1].argmax(1) for part in data.real.images.split(500)])
    accuracy = float((found == data.real.labels).float().mean())
    save_file(network.state_dict(), WEIGHTS)
    about = {
        "command": "python benchmarks/evidence/_classifier.py", "epochs": epochs, "batch": batch, "seed": seed,
        "test accuracy": accuracy, "hardware": f"{platform.machine()} CPU", "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    WEIGHTS.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    print(about)


if __name__ == "__main__":
    main()
