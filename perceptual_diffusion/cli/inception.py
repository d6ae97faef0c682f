"""The Inception of the FID: torch-fidelity's, with the weights that it is published with."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perceptual_diffusion.cli._errors import UserError

SHA256 = "6726825d"
"""What the SHA-256 of the weights begins with, as their file's name says."""


class Inception(nn.Module):
    """Inception v3 with its TensorFlow weights: uint8 pictures (B, 3, H, W) to features (B, 2048) and logits (B, 1008).

    Args:
        weights: the file of its weights; by default torch's cache, where they are fetched to.

    Raises:
        UserError: torch-fidelity or the weights are not there, or the weights are other ones.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-untyped,unused-ignore]
                URL_INCEPTION_V3,
                FeatureExtractorInceptionV3,
            )
        except ImportError as error:
            raise UserError(
                "--network inception needs torch-fidelity, which is not installed. Run `pip install torch-fidelity`."
            ) from error
        file = weights if weights is not None else _fetch(URL_INCEPTION_V3)
        try:
            with file.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"--weights {str(file)!r} cannot be read: {error.strerror}. Give another file.") from error
        if not found.startswith(SHA256):
            raise UserError(
                f"the SHA-256 of {str(file)!r} begins with {found[:8]}, expected {SHA256}, torch-fidelity's Inception: "
                f"only its distance is the FID. Give the file of {URL_INCEPTION_V3}."
            )
        with _tensors_only():
            self.model: Any = FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
            )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Give the features (B, 2048) and the logits (B, 1008) of uint8 pictures."""
        features, logits = self.model(images)
        return features, logits


def _fetch(url: str) -> Path:
    """Give the file of the weights in torch's cache, fetched if it is not there."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"Inception's weights are not at {str(file)!r} and cannot be fetched: {error}. Give their file with --weights, "
                "or leave out --network."
            ) from error
    return file


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Let torch read tensors from a file and nothing else: torch-fidelity asks it for whatever is in there."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
