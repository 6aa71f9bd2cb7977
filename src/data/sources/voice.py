"""A synthetic voice whose symbols, durations, pitch and speaker are known, and which is read back without a network.

A symbol is a vowel with three formants, each a resonance F with bandwidth B, at the gain

    |H(f)| = F^2 / sqrt((F^2 - f^2)^2 + (B f)^2)

A speaker is a pitch f0 and a scale s of all formants (the length of the vocal tract). The sound of a symbol has the
harmonics k f0 with the amplitudes prod_F |H(k f0; s F)| / k, and the same power for all symbols; symbols follow each
other with a cross-fade.

The judge knows the frames of each symbol, scale and pitch in closed form, since harmonics add up in power: it takes the
scale and pitch whose symbols explain all frames together best, and then the way through the symbols that explains them
best, each with a few frames at least (Viterbi).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from src.codecs.mel import Mel, mel_filters
from src.data.example import Example

FORMANTS = {  # Hz, means of men (Peterson & Barney 1952)
    "a": (730, 1090, 2440),
    "e": (530, 1840, 2480),
    "i": (270, 2290, 3010),
    "o": (570, 840, 2410),
    "r": (490, 1350, 1690),
    "u": (300, 870, 2240),
}
SYMBOLS = "".join(FORMANTS)
BANDWIDTHS = (80.0, 100.0, 150.0)  # Hz
SCALES, PITCHES = (0.85, 1.2), (100.0, 220.0)  # of speakers, spread evenly in their logarithms
SPEAKERS, NEW_SPEAKERS = 256, 16
COUNT, HELD_OUT = 20_000, 400
DURATIONS = (4, 5, 6, 7, 8)  # frames of a symbol
FADE = 0.25  # of a frame's hop, of the cross-fade
POWER = 0.1  # root mean square of each symbol
HELD_OUT_SHARE = 8  # one in so many sequences of symbols is held out, by its checksum
STEP = 1.025  # between neighbouring scales, and pitches, of the judge
CHANGE, MOST = 0.2, 2.0  # cost of a symbol, and most cost of a frame, in squared nepers
PIECE = 4  # frames whose joint distribution is compared
SHORTEST = 3  # frames of a symbol that is read
SCALE_ERROR, PITCH_ERROR = 0.05, 1.0  # most of the same speaker: in the logarithm; in semitones


class _Reading(NamedTuple):
    """What the judge reads: the symbol of each frame, the speaker, and what is left of a frame (squared nepers)."""

    labels: np.ndarray
    scale: float
    pitch: float
    left: float

    @property
    def text(self) -> str:
        return merged(self.labels)


class Voice:
    """`audio`, a waveform [samples], and its `text`, a letter for each symbol; `scale` and `pitch` of its speaker, and
    `labels` [frames], the symbol of each frame. A held-out example also has a `voice`, the waveform of another held-out
    speaker, with `voice_text`: its `scale` and `pitch` are those of that speaker, who shall say the `text`.

    mel      the codec of the frames; it says the rate, hop and number of frames
    voice    frames of such a `voice`, which takes its place from the row: `frames` - `voice` are left for the text

    The speakers and the sequences of symbols of the split "test" are none of the training's.
    Raises ValueError for frames that do not suffice, and a rate that is too low for the formants.
    """

    held_out = HELD_OUT
    holds = "values"
    PARTS: ClassVar[dict[str, str]] = {"mel": "codecs"}

    def __init__(self, *, mel: Mel, voice: int = 16):
        least = 3 * max(DURATIONS)
        if voice < max(DURATIONS) or mel.frames - voice < least:
            raise ValueError(
                f"voice={voice} of {mel.frames} frames is not possible: give at least {max(DURATIONS)}, and leave"
                f" {least} for the text"
            )
        if mel.rate < 8000:
            raise ValueError(f"rate={mel.rate} is too low for the formants of the voice: give at least 8000")
        self.mel, self.voice = mel, voice

    def __len__(self) -> int:
        return COUNT + HELD_OUT

    def __getitem__(self, number: int) -> Example:
        random, frames = np.random.RandomState(number), self.mel.frames
        if number < COUNT:
            scale, pitch = speaker(number % SPEAKERS)
            labels = _labels(random, random.randint(3 * frames // 4, frames + 1), False)
            return Example({"audio": self.wave(labels, scale, pitch)} | _said(labels, scale, pitch), f"voice {number}")
        who = number % NEW_SPEAKERS
        other = (who + 1 + random.randint(NEW_SPEAKERS - 1)) % NEW_SPEAKERS
        said = _labels(random, frames - self.voice, True)
        heard = _labels(random, self.voice, True)
        scale, pitch = speaker(SPEAKERS + who)
        values = {"audio": self.wave(said, *speaker(SPEAKERS + other)), "voice": self.wave(heard, scale, pitch)}
        return Example(values | {"voice_text": merged(heard)} | _said(said, scale, pitch), f"voice {number}")

    def texts(self) -> tuple[str, ...]:
        """What a tokenizer is trained on."""
        return (SYMBOLS,)

    def every(self, name: str) -> list[str]:
        """A longest text."""
        return ["ae" * (self.mel.frames // min(DURATIONS) // 2 + 1)]

    def wave(self, labels: Int[np.ndarray, " n"], scale: float, pitch: float) -> Float[np.ndarray, " samples"]:
        """The sound of so many frames, float32."""
        hop = self.mel.hop
        tables = _tables(self.mel, scale, pitch)
        gains = np.repeat(np.eye(len(SYMBOLS), dtype=np.float32)[labels], hop, axis=0)
        width = max(int(hop * FADE), 1)
        padded = np.pad(gains, ((width, width), (0, 0)), mode="edge").cumsum(axis=0)
        gains = (padded[2 * width :] - padded[: -2 * width]) / (2 * width)
        return np.einsum("nc,cn->n", gains, tables[:, : len(gains)]).astype(np.float32)

    def judged(self, asked: Mapping[str, Any], made: Float[np.ndarray, "T 1 M"]) -> dict[str, float]:
        """Of the last frames that are asked for, as many as `labels` has, behind those of a `voice`:

        symbol_error   edits from the text to what is read, for each symbol of the text
        same_speaker   scale and pitch are read as those asked for, up to 5 % and a semitone
        right          both: no edits, and the same speaker
        scale_error, pitch_error   in %, and in semitones
        duration_error   share of the frames with another symbol than in `labels`
        left           what the best reading leaves of a frame, in squared nepers
        """
        first = len(asked["voice"]) // self.mel.hop if "voice" in asked else 0
        found = self.read(made[first : first + len(asked["labels"])])
        edits = distance(found.text, asked["text"])
        scale = abs(np.log(found.scale / asked["scale"]))
        pitch = 12 * abs(np.log2(found.pitch / asked["pitch"]))
        same = bool(scale <= SCALE_ERROR and pitch <= PITCH_ERROR)
        return {
            "symbol_error": edits / len(asked["text"]),
            "same_speaker": float(same),
            "right": float(same and not edits),
            "scale_error": float(100 * scale),
            "pitch_error": float(pitch),
            "duration_error": float(np.mean(found.labels != asked["labels"])),
            "left": found.left,
        }

    def features(
        self, asked: Mapping[str, Any], made: Float[np.ndarray, "T 1 M"]
    ) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n d"]]:
        """Pieces of `PIECE` frames of what was made, and of the text as the speaker really says it."""
        first = len(asked["voice"]) // self.mel.hop if "voice" in asked else 0
        real = self.mel.encode(self.wave(asked["labels"], asked["scale"], asked["pitch"]))
        both = made[first : first + len(real)], real
        return tuple(x[: len(x) // PIECE * PIECE].reshape(-1, PIECE * self.mel.bands) for x in both)

    def read(self, frames: Float[np.ndarray, "n 1 M"]) -> _Reading:
        """The symbols and the speaker of some frames; loudness does not matter."""
        scales, pitches, known = _known(self.mel)
        x = np.nan_to_num(np.asarray(frames, np.float32)[:, 0])
        x = x - x.mean(axis=1, keepdims=True)
        apart = (x**2).sum(1)[:, None] - 2 * x @ known.reshape(-1, x.shape[1]).T + (known**2).sum(-1).reshape(1, -1)
        apart = np.minimum(np.maximum(apart, 0).reshape(len(x), *known.shape[:3]) / x.shape[1], MOST)
        total = apart.min(axis=-1).sum(axis=0)
        best = np.unravel_index(np.argmin(total), total.shape)
        labels = cheapest_runs(apart[:, best[0], best[1]], SHORTEST, CHANGE)
        return _Reading(labels, float(scales[best[0]]), float(pitches[best[1]]), float(total[best] / len(x)))


def speaker(number: int) -> tuple[float, float]:
    """Scale of the formants and pitch in Hz; consecutive numbers are spread evenly (Roberts' R2 sequence)."""
    share = (0.5 + (number + 1) * np.array([0.7548776662466927, 0.5698402909980532])) % 1
    (low, high), (deep, shrill) = SCALES, PITCHES
    return float(low * (high / low) ** share[0]), float(deep * (shrill / deep) ** share[1])


def merged(labels: Int[np.ndarray, " n"]) -> str:
    """The text of some frames: a letter for each run of equal symbols."""
    changes = np.flatnonzero(np.diff(labels, prepend=-1))
    return "".join(SYMBOLS[label] for label in labels[changes])


def distance(one: str, other: str) -> int:
    """Insertions, deletions and replacements of letters from one text to the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, wanted in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != wanted))
    return row[-1]


def cheapest_runs(costs: Float[np.ndarray, "n c"], least: int, change: float) -> Int[np.ndarray, " n"]:
    """The symbols with the least sum of costs, where each run of one costs `change` and has at least `least` frames, or
    is the only one (a semi-Markov Viterbi)."""
    sums = np.concatenate([np.zeros((1, costs.shape[1])), costs.cumsum(axis=0)])
    total, way = [0.0], [np.zeros(0, np.int64)]
    for end in range(1, len(sums)):
        starts = [start for start in range(max(end - least + 1, 1)) if start in (0, *range(least, end - least + 1))]
        found = np.array(total)[starts, None] + sums[end] - sums[starts]
        best, symbol = np.unravel_index(np.argmin(found), found.shape)
        total.append(float(found[best, symbol]) + change)
        way.append(np.append(way[starts[best]], np.full(end - starts[best], symbol)))
    return way[-1]


def _said(labels: np.ndarray, scale: float, pitch: float) -> dict[str, Any]:
    return {"text": merged(labels), "labels": labels, "scale": scale, "pitch": pitch}


def _labels(random: np.random.RandomState, frames: int, held_out: bool) -> np.ndarray:
    """Symbols of so many frames, no two alike side by side, of a sequence of the wanted split."""
    while True:
        found: list[int] = []
        while len(found) < frames:
            symbol = random.randint(len(SYMBOLS) - bool(found))
            symbol += bool(found) and symbol >= found[-1]
            found += [int(symbol)] * DURATIONS[random.randint(len(DURATIONS))]
        if found[frames - min(DURATIONS)] != found[-1]:
            continue  # the last symbol would be too short
        labels = np.array(found[:frames])
        if (zlib.crc32(merged(labels).encode()) % HELD_OUT_SHARE == 0) == held_out:
            return labels


def _amplitudes(scale: float, pitch: float, rate: int) -> Float[np.ndarray, "c K"]:
    """Of the harmonics of each symbol below half the rate."""
    hertz = pitch * np.arange(1, int(rate / 2 / pitch - 1e-9) + 1)
    gains = [np.prod([_resonance(hertz, scale * f, b) for f, b in zip(each, BANDWIDTHS, strict=True)], axis=0)
             for each in FORMANTS.values()]  # fmt: skip
    found = np.stack(gains) / np.arange(1, len(hertz) + 1)
    return found * POWER / np.sqrt((found**2).sum(axis=1, keepdims=True) / 2)


def _resonance(hertz: np.ndarray, formant: float, bandwidth: float) -> np.ndarray:
    return formant**2 / np.sqrt((formant**2 - hertz**2) ** 2 + (bandwidth * hertz) ** 2)


@functools.lru_cache(maxsize=512)
def _tables(mel: Mel, scale: float, pitch: float) -> Float[np.ndarray, "c samples"]:
    """The sound of each symbol, as long as a row; the phases are those of a sweep, so that no sample stands out."""
    amplitudes = _amplitudes(scale, pitch, mel.rate)
    number = np.arange(1, amplitudes.shape[1] + 1)[:, None]
    phases = 2 * np.pi * number * pitch / mel.rate * np.arange(mel.frames * mel.hop) + np.pi * number**2 / len(number)
    return (amplitudes @ np.sin(phases)).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _known(mel: Mel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales, pitches, and the frames of each scale, pitch and symbol, without their means."""
    scales, pitches = (_ladder(*ends) for ends in (SCALES, PITCHES))
    found = np.empty((len(scales), len(pitches), len(SYMBOLS), mel.bands), np.float32)
    bins = np.arange(mel.window // 2 + 1) * mel.rate / mel.window
    for j, pitch in enumerate(pitches):
        count = int(mel.rate / 2 / pitch - 1e-9)
        lobes = hann_lobe((bins - pitch * np.arange(1, count + 1)[:, None]) * mel.window / mel.rate) ** 2
        for i, scale in enumerate(scales):
            power = _amplitudes(scale, pitch, mel.rate) ** 2 @ lobes
            found[i, j] = np.log(np.maximum(np.sqrt(power) @ mel_filters(mel).T, mel.floor))
    return scales, pitches, found - found.mean(axis=-1, keepdims=True)


def _ladder(low: float, high: float) -> np.ndarray:
    """A little beyond both ends in steps of `STEP`."""
    count = int(np.ceil(np.log(high / low) / np.log(STEP))) + 7
    return low * STEP ** (np.arange(count) - 3)


def hann_lobe(bins: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """The magnitude of a Hann window's transform so many bins from a sine, 1 at 0: sinc(x) / (1 - x^2)."""
    near = np.abs(np.abs(bins) - 1) < 1e-6
    return np.abs(np.where(near, 0.5, np.sinc(bins) / np.where(near, 1.0, 1 - bins**2)))
