"""How alike two images are, pixel by pixel: peak signal-to-noise ratio and structural similarity."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

WINDOW, SIGMA = 11, 1.5  # pixels, of the Gaussian window of SSIM
K1, K2 = 0.01, 0.03
LEVELS = 255.0


def psnr(x: UInt8[np.ndarray, "n h w C"], y: UInt8[np.ndarray, "n h w C"]) -> Float[np.ndarray, " n"]:
    """10 log10(255² / mean squared error) of each pair of images, in decibels.

    Equal images would have infinity; they get what one value that is one level off would have, so that means stay
    finite.
    """
    apart = x.astype(np.float64) - y
    error = (apart**2).reshape(len(x), -1).mean(axis=1)
    least = 1 / apart[0].size if len(x) else 1.0
    return 10 * np.log10(LEVELS**2 / np.maximum(error, least))


def ssim(x: UInt8[np.ndarray, "n h w C"], y: UInt8[np.ndarray, "n h w C"]) -> Float[np.ndarray, " n"]:
    """The mean structural similarity of each pair of images (Wang et al. 2004, eq. 13), over channels and all places
    where the window lies inside of the image.

    The window is a Gaussian of 11 x 11 pixels and deviation 1.5, cut to `window(h, w)` for smaller images; moments are
    weighted by it, without a correction of their number.
    """
    side = window(*x.shape[1:3])
    place = np.arange(side) - side // 2
    weights = np.exp(-(place**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean_x, mean_y = _blurred(x, weights), _blurred(y, weights)
    variance_x = _blurred(x * x, weights) - mean_x**2
    variance_y = _blurred(y * y, weights) - mean_y**2
    covariance = _blurred(x * y, weights) - mean_x * mean_y
    c1, c2 = (K1 * LEVELS) ** 2, (K2 * LEVELS) ** 2
    brightness = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (brightness * structure).mean(axis=(1, 2, 3))


def window(height: int, width: int) -> int:
    """Side of the window for images of a size: 11, or the largest odd number that is no longer than a side."""
    least = min(height, width)
    return min(WINDOW, least - (least + 1) % 2)


def _blurred(images: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted means of windows, [n, h - side + 1, w - side + 1, C]."""
    for axis in (1, 2):
        places = images.shape[axis] - len(weights) + 1
        parts = (np.take(images, range(start, start + places), axis=axis) for start in range(len(weights)))
        images = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    return images
