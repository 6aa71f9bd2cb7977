"""Frames of sound that are made from a text and from some frames of the same voice (EZ-VC; Voicebox, F5-TTS).

    frames     noisy | noisy | noisy | noisy | noisy        noise is added to all frames; the span is the target
    prompt     known |  --   |  --   |  --   | known        the frames beside the span, as they are; "--": zeros
    units      t     |  t    |  e    |  x    |  t           the text, a token for each frame

All three lie on the same tokens, so their embeddings add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from src.codecs.chain import decode_compiled
from src.data.example import BadRow, Example, Row, Source, texts_of
from src.data.files.wave_file import read_wave
from src.data.templates._base import Request, Template
from src.data.words import encode, field_of, text_codec
from src.interfaces import Batch, Field, Layout, Tokens
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment

PLACES = ("spread", "first")


class Infilling(Template):
    """Names `frames` (made), `prompt` and `units`. Uniform numbers: length and start of the span, and the two drops.

    span         (least, most) share of the frames that a training row has to fill in, in one piece
    drop_prompt  probability that no frames are known; `drop`: that neither frames nor text are, for classifier-free
                 guidance. A prompt without conditions (`null`) is such a row
    place        of the text's tokens: `spread`, evenly over the frames (Zhu et al. 2025, ZipVoice); `first`, on the
                 first frames, with padding behind (EZ-VC, F5-TTS)
    frames, prompt, units   fields. The first two have one codec, whose first link takes waveforms

    A training example has `audio`, a waveform, and `text`. A prompt has `text`, `frames` (their number), and `voice`, a
    waveform or the path of a WAV file, with its `voice_text`: these frames come first, are made anew,
    too, and stay known as `prompt`.
    """

    draws = 4
    needs, answers, optional = ("text", "audio"), ("audio",), ("voice", "voice_text", "frames")

    def __init__(
        self,
        *,
        span: Sequence[float] = (0.7, 1.0),
        drop_prompt: float = 0.3,
        drop: float = 0.2,
        place: str = "spread",
        frames: str = "frames",
        prompt: str = "prompt",
        units: str = "units",
    ):
        if len(span) != 2 or not 0 < span[0] <= span[1] <= 1:
            raise ValueError(f"span={span} is not possible: give two shares of the frames, 0 < least <= most <= 1")
        if place not in PLACES:
            raise ValueError(f"place={place!r} is unknown; use one of {', '.join(PLACES)}")
        self.span, self.drop_prompt, self.drop, self.place = tuple(span), drop_prompt, drop, place
        self.names, self.fill = (frames, prompt, units), (frames,)

    def bind(self, fields: Mapping[str, Field], source: Source) -> None:
        """See `Template.bind`."""
        frames, prompt, units = self.names
        field, self.codec = field_of(fields, frames, "frames"), text_codec(fields, units, "units")
        self.mel, known = field.codec.host, field_of(fields, prompt, "prompt").codec
        if known.host != self.mel or known.spec != field.spec:
            raise ValueError(f"fields.{frames} and fields.{prompt} have different codecs: give both the same")
        if (theirs := getattr(source, "mel", self.mel)) != self.mel:
            raise ValueError(f"the source has {theirs} and fields.{frames}.codec {self.mel}: give both the same")
        if (rate := getattr(source, "rate", self.mel.rate)) != self.mel.rate:
            raise ValueError(
                f"the source has {rate} samples a second and fields.{frames}.codec has {self.mel.rate}: give both"
                " the same"
            )
        self.length = field.spec.tokens
        zeros = np.zeros((1, self.length, field.spec.features), np.float32)
        self.nothing = np.asarray(decode_compiled(field.codec, zeros))[0]  # what becomes zeros

    @property
    def layout(self) -> Layout:
        """One segment of all names."""
        return FixedLayout((Segment(self.names, self.length, blocks="bidirectional", role="noisy"),))

    def row(self, example: Example, request: Request) -> Row:
        """See `Template.row`."""
        if request.prompt:
            return self._prompt(example, request.null)
        mel = self._frames(example.get("audio"), example.where)
        count, ids = len(mel), self._ids(texts_of(example, "text")[0], len(mel), example.where)
        first, last, no_prompt, no_text = 0, count, False, False
        if request.uniforms is not None:
            share, start, both, known = request.uniforms
            size = max(round(count * (self.span[0] + (self.span[1] - self.span[0]) * share)), 1)
            first = int(start * (count - size + 1))
            last, no_text = first + size, both < self.drop
            no_prompt = no_text or known < self.drop_prompt
        target = np.zeros(self.length, bool)
        target[first:last] = True
        beside = (np.arange(count) < first) | (np.arange(count) >= last)
        row = self._row(count, [] if no_text else ids, target)
        row["frames"][:count] = mel
        if not no_prompt:
            row["prompt"][:count][beside] = mel[beside]
        return row

    def _prompt(self, example: Example, null: bool) -> Row:
        """A row to be made. Raises BadRow and ValueError."""
        if example.get("audio") is not None:
            raise ValueError("the audio is what is made: give a text, and a voice, without it")
        voice, where = example.get("voice"), example.where
        known = self._frames(voice, where) if voice is not None else np.zeros((0, *self.nothing.shape[1:]))
        asked = str(example.get("frames", self.length - len(known)))
        if not asked.isdigit() or not 0 < int(asked) <= self.length - len(known):
            raise BadRow(
                "the number of frames is not possible", where, f"{asked}, and there is room for 1 to"
                f" {self.length - len(known)}",
            )  # fmt: skip
        count = len(known) + int(asked)
        text = (example.get("voice_text", "") if voice is not None else "") + texts_of(example, "text")[0]
        ids = self._ids(text, count, where)
        row = self._row(count, [] if null else ids, np.arange(self.length) < count)
        if not null:
            row["prompt"][: len(known)] = known
        return row

    def _row(self, count: int, ids: Sequence[int], target: np.ndarray) -> Row:
        """The arrays of a row of so many frames, of which nothing is known yet."""
        units = np.full(self.length, self.codec.pad, np.int32)
        if ids and self.place == "spread":
            units[:count] = np.asarray(ids)[np.arange(count) * len(ids) // count]
        units[: len(ids) if self.place == "first" else 0] = ids if self.place == "first" else []
        sounds = {name: self.nothing.copy() for name in ("frames", "prompt")}
        return sounds | {"units": units, "valid": np.arange(self.length) < count, "target": target}

    def _frames(self, audio: Any, where: str) -> np.ndarray:
        if audio is None:
            raise BadRow("there is no audio", where)
        if isinstance(audio, str):
            rate, audio = read_wave(audio)
            if rate != self.mel.rate:
                raise BadRow("the audio has another rate", where, f"{rate:,} samples a second, not {self.mel.rate:,}")
        try:
            return self.mel.encode(np.asarray(audio))
        except ValueError as error:
            raise BadRow("the audio cannot be used", where, error) from error

    def _ids(self, text: str, count: int, where: str) -> list[int]:
        ids, whole = encode(self.codec, text, self.length, where)
        if not whole or len(ids) > count:
            raise BadRow("the text is longer than its audio", where, f"{len(text):,} characters, {count} frames")
        return ids

    def question(self, example: Example) -> Example:
        """See `Template.question`: of an example without a `voice`, its own first frames are one."""
        values, hop = dict(super().question(example)), self.mel.hop
        count, audio = len(example["audio"]) // hop, example["audio"]
        if "voice" not in values:
            known = max(round(count * (1 - self.span[0]) / 2), -(-self.mel.window // hop))
            values |= {"voice": audio[: known * hop], "voice_text": ""}
            count -= known
        return Example(values | {"frames": count}, example.where)

    def invented_question(self) -> Example:
        """See `Template.invented_question`."""
        return Example({"text": "a", "frames": self.length}, "made up")

    def blank(self) -> Row:
        """See `Template.blank`."""
        return self._row(0, [], np.zeros(self.length, bool))

    def invent(self, rng: np.random.Generator, number: int) -> Row:
        """See `Template.invent`."""
        row = self._row(self.length, [self.codec.eos] * (self.length // 2), rng.random(self.length) < 0.8)
        row["frames"] = row["frames"] + rng.standard_normal(self.nothing.shape).astype(np.float32)
        return row

    def collate(self, rows: Mapping[str, np.ndarray]) -> Batch:
        """See `Template.collate`."""
        nothing = np.zeros_like(rows["target"])
        targets = (rows["target"], nothing, nothing)
        own = zip(self.names, ("frames", "prompt", "units"), targets, strict=True)
        return Batch({name: Tokens(rows[key], rows["valid"], target) for name, key, target in own})
