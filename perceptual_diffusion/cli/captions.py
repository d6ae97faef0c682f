"""Captions as the denoiser is given them: encoded once per run where memory allows."""

import torch
from torch import Tensor

from perceptual_diffusion.cli.pipelines import Pipeline

CACHE = 2 * 2**30
"""Bytes of encoded captions that are kept; more are encoded on the fly."""


class Captions:
    """Encoded captions, kept where memory allows.

    Args:
        loaded: what encodes them.
        texts: all captions of the data.
        batch: how many are encoded at a time.
    """

    def __init__(self, loaded: Pipeline, texts: list[str], batch: int) -> None:
        self.loaded = loaded
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.nothing = self._rows(loaded.encode_nothing())[0]
        unique = list(dict.fromkeys(texts))
        size = sum(row.nbytes for row in self.nothing.values()) * len(unique)
        if size <= CACHE:
            for start in range(0, len(unique), batch):
                part = unique[start : start + batch]
                self.kept |= dict(zip(part, self._rows(loaded.encode(part)), strict=True))
            for encoder in loaded.encoders:
                encoder.to("cpu")

    def rows(self, texts: list[str], left_out: list[bool], device: torch.device) -> dict[str, Tensor]:
        """Give the encoded captions of a batch, "nothing" where the caption is left out."""
        if self.kept:
            found = [self.kept[text] for text in texts]
        else:
            with torch.no_grad():
                found = self._rows(self.loaded.encode(texts))
        rows = [self.nothing if out else row for row, out in zip(found, left_out, strict=True)]
        return {name: torch.stack([row[name] for row in rows]).to(device) for name in self.nothing}

    @staticmethod
    def _rows(encoded: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        parts = {name: value.detach().cpu().unbind() for name, value in encoded.items()}
        return [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]
