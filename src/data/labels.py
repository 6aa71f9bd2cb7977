"""Class-conditional digits: a label that conditions the whole row, and no text (SiT, DiT)."""

from __future__ import annotations

import numpy as np

from src.data.digits import SHAPE, load, shifted
from src.data.rows import RowTask, image_tokens
from src.interfaces import Field, ImageField, LabelField
from src.sequence.layout import Segment


class LabelToImage(RowTask):
    """Fields label [B] and image [B, 8, 8, 1]; one image segment, bidirectional unless `image_mode` says otherwise.

    `classes` is 10. In training the label is replaced by `null` = 10 with probability `drop`, for classifier-free
    guidance (Ho & Salimans 2022), so the model's label table needs classes + 1 rows.
    """

    name = "label_to_image"
    draws = 3
    image_shape = SHAPE
    classes = 10
    null = 10

    def __init__(self, *, patch: int = 2, image_mode: str = "bidirectional", drop: float = 0.1, shift: int = 1):
        self.drop, self.shift = drop, shift
        self.segments = (Segment("image", "image", image_tokens(*SHAPE[:2], patch), image_mode),)

    def rows(self, split: str) -> int:
        """1437 of "train", 360 of "test"."""
        return len(load(split).labels)

    def build(
        self, split: str, index: np.ndarray, uniforms: np.ndarray | None, extra: dict[str, np.ndarray]
    ) -> dict[str, Field]:
        """Fields of the rows: uniforms are drop, shift down, shift right."""
        images = load(split)
        labels = images.labels[index]
        if uniforms is not None:
            labels = np.where(uniforms[:, 0] < self.drop, self.null, labels)
        shift = None if uniforms is None else uniforms[:, 1:3]
        values = shifted(images.values[index], shift, self.shift)
        return {"label": LabelField(labels.astype(np.int32)), "image": ImageField(values)}
