"""WAV files, as the numbers of one channel."""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
from jaxtyping import Float

from src.common.files.paths import read_bounded

BYTES = 1 << 28  # an hour and a half at 24,000 samples of 16 bits a second


def read_wave(path: str | os.PathLike[str]) -> tuple[int, Float[np.ndarray, "*samples"]]:
    """Samples a second, and the samples, float32; whole numbers of 8, 16, 24 or 32 bits lie in [-1, 1].

    Raises FileNotFoundError, OSError, and ValueError for a file that is no WAV file, or is empty.
    """
    from scipy.io import wavfile

    data = read_bounded(path, BYTES, "WAV file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks with other things
            rate, samples = wavfile.read(io.BytesIO(data))
    except Exception as error:  # the reader has no errors of its own: struct.error, IndexError and others
        raise ValueError(f"it is no WAV file ({error})") from error
    if not samples.size:
        raise ValueError("it has no samples")
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128) / 128
    elif np.issubdtype(samples.dtype, np.integer):
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    return int(rate), samples.astype(np.float32)
