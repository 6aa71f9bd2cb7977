"""Mel spectrograms: waveforms <-> log-mel frames, on the host.

    X[i, k] = 2 / sum(w) * sum_n w[n] x[i hop + n - (window - hop) / 2] exp(-2 pi j k n / window),  w = Hann
    frame[i, m] = log max(floor, sum_k filter[m, k] |X[i, k]|)

so that a sine of amplitude 1 has a peak of 1. The signal is mirrored at its ends, and hop samples are one frame, as in
HiFi-GAN's front end (Kong et al. 2020). The filters are triangles with corners at equal steps of the mel scale
2595 log10(1 + f / 700): between the first and the last centre they add up to 1.

Back to a waveform: magnitudes by least squares, phases by Griffin & Lim (1984) with momentum (Perraudin et al. 2013).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import numpy as np
from jaxtyping import Complex, Float

ROUNDS, MOMENTUM = 60, 0.99  # of Griffin & Lim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mel:
    """Waveforms [samples], in [-1, 1], as log-mel frames [n, 1, bands], at most `frames` of them.

    frames    T, the most frames of a waveform, and those of a row
    rate      samples a second
    window    samples of a frame's window, even
    hop       samples from one frame to the next, even
    bands     M, numbers of a frame
    low, high   first and last corner of the triangles in Hz; high None: half the rate
    floor     the least magnitude of a band

    Raises ValueError for sizes that do not go together, and for filters so narrow that one holds no frequency.
    """

    where: ClassVar[str] = "host"
    spec: ClassVar[None] = None

    frames: int
    rate: int = 16_000
    window: int = 1024
    hop: int = 160
    bands: int = 80
    low: float = 0.0
    high: float | None = None
    floor: float = 1e-4

    def __post_init__(self):
        least = min(self.frames, self.rate, self.hop, self.bands)
        if least < 1 or self.hop % 2 or self.window % 2 or self.window < self.hop or not self.floor > 0:
            raise ValueError(
                f"frames={self.frames}, rate={self.rate}, window={self.window}, hop={self.hop}, bands={self.bands},"
                f" floor={self.floor} is not possible: give sizes of at least 1, an even hop, an even window that is no"
                " shorter, and a floor above 0"
            )
        if not 0 <= self.low < self.top <= self.rate / 2:
            raise ValueError(
                f"low={self.low} and high={self.high} are not possible: give 0 <= low < high <= {self.rate / 2} Hz,"
                " half the rate"
            )
        if not mel_filters(self).any(axis=1).all():
            raise ValueError(
                f"bands={self.bands} with window={self.window} leave a band without a frequency: give fewer bands or a"
                " longer window"
            )

    @property
    def top(self) -> float:
        """The last corner of the triangles in Hz."""
        return self.rate / 2 if self.high is None else self.high

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a row's frames."""
        return self.frames, 1, self.bands

    def encode(self, value: Float[np.ndarray, "*samples"]) -> Float[np.ndarray, "n 1 M"]:
        """Frames of a waveform, float32; samples that fill no hop are left out.

        Raises ValueError for what is no waveform: of several channels, not finite, silent, too short or too long.
        """
        wave = np.asarray(value)
        if wave.ndim != 1:
            raise ValueError(f"it has the shape {wave.shape}, and one channel is wanted")
        if not np.isfinite(wave).all():
            raise ValueError(f"{np.count_nonzero(~np.isfinite(wave)):,} of its samples are not finite")
        if not wave.any():
            raise ValueError("all of its samples are 0")
        if not self.window <= len(wave) < (self.frames + 1) * self.hop:
            raise ValueError(
                f"it has {len(wave):,} samples, and at least {self.window:,} and less than"
                f" {(self.frames + 1) * self.hop:,} are wanted"
            )
        magnitude = np.abs(stft(wave.astype(np.float64), self.window, self.hop))
        mel = np.log(np.maximum(magnitude @ mel_filters(self).T, self.floor))
        return mel[:, None].astype(np.float32)

    def cut(self, value: Float[np.ndarray, "T 1 M"], count: int) -> Float[np.ndarray, "{count} 1 M"]:
        """The first frames of a row, without its padding."""
        return value[:count]

    def decode(self, value: Float[np.ndarray, "n 1 M"]) -> Float[np.ndarray, " samples"]:
        """A waveform with about these frames, float32, n hops long; what is at the floor is silent."""
        mel = np.asarray(value, np.float64)[:, 0]
        mel = np.where(mel > np.log(self.floor), np.exp(np.minimum(mel, 10.0)), 0.0)
        magnitude = np.maximum(mel @ _inverse(self).T, 0.0)
        return griffin_lim(magnitude, self.window, self.hop).astype(np.float32)


@functools.lru_cache(maxsize=16)
def mel_filters(mel: Mel) -> Float[np.ndarray, "M bins"]:
    """Triangles of height 1, with corners at the centres beside them."""
    to_mel = lambda hertz: 2595 * np.log10(1 + hertz / 700)
    corners = 700 * (10 ** (np.linspace(to_mel(mel.low), to_mel(mel.top), mel.bands + 2) / 2595) - 1)
    bins = np.arange(mel.window // 2 + 1) * mel.rate / mel.window
    rising = (bins - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - bins) / (corners[2:] - corners[1:-1])[:, None]
    return np.maximum(np.minimum(rising, falling), 0.0)


@functools.lru_cache(maxsize=16)
def _inverse(mel: Mel) -> Float[np.ndarray, "bins M"]:
    return np.linalg.pinv(mel_filters(mel), rcond=1e-3)


@functools.lru_cache(maxsize=16)
def _hann(window: int) -> Float[np.ndarray, " window"]:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)


def stft(wave: Float[np.ndarray, " samples"], window: int, hop: int) -> Complex[np.ndarray, "n bins"]:
    """The short-time Fourier transform of the module's docstring: one frame for each whole hop."""
    margin, count = (window - hop) // 2, len(wave) // hop
    padded = np.pad(wave, margin, mode="reflect")
    pieces = np.lib.stride_tricks.sliding_window_view(padded, window)[: count * hop : hop]
    return np.fft.rfft(pieces * _hann(window)) * (2 / _hann(window).sum())


def istft(spectrum: Complex[np.ndarray, "n bins"], window: int, hop: int) -> Float[np.ndarray, " samples"]:
    """The waveform of n hops whose transform is nearest by least squares: the inverse of `stft`, where it has one."""
    hann, margin, count = _hann(window), (window - hop) // 2, len(spectrum)
    pieces = np.fft.irfft(spectrum, window) * (hann.sum() / 2) * hann
    wave, weight = np.zeros((2, (count - 1) * hop + window))
    for number, piece in enumerate(pieces):
        wave[number * hop : number * hop + window] += piece
        weight[number * hop : number * hop + window] += hann**2
    inside = slice(margin, margin + count * hop)
    return wave[inside] / np.maximum(weight[inside], 1e-8)


def griffin_lim(
    magnitude: Float[np.ndarray, "n bins"], window: int, hop: int, rounds: int = ROUNDS
) -> Float[np.ndarray, " samples"]:
    """A waveform whose transform has about these magnitudes; the phases begin at random, always the same."""
    random = np.random.RandomState(0).random_sample(magnitude.shape)
    phase, before = np.exp(2j * np.pi * random), 0.0
    for _ in range(rounds if len(magnitude) * hop > (window - hop) // 2 else 0):
        found = stft(istft(magnitude * phase, window, hop), window, hop)
        ahead = found + MOMENTUM * (found - before)
        phase, before = ahead / np.maximum(np.abs(ahead), 1e-12), found
    return istft(magnitude * phase, window, hop)
