"""Recordings: a folder of WAV files, each with its text in a file of the same name (`hello.wav`, `hello.txt`)."""

from __future__ import annotations

import os
from typing import ClassVar

from etils import epath

from src.common.files.paths import read_bounded
from src.data.example import BadRow, Example
from src.data.files.folder_walk import files_below
from src.data.files.left_out import LeftOut, is_system_file
from src.data.files.wave_file import read_wave
from src.data.sources._files import FileSource

TEXT = 1 << 20  # bytes of a text, at most


class Recordings(FileSource):
    """`audio`, a waveform [samples] in [-1, 1] of `rate` samples a second, and its `text`; the last `held_out` files,
    by name, are "test".

    Bad rows: a file that is no WAV file, of another rate or with several channels, and one without a text. Others are
    left to the template: silence, samples that are not finite, a text that is longer than its audio.
    """

    holds: ClassVar[str] = "values"

    def __init__(self, folder: str | os.PathLike[str], *, rate: int = 16_000, held_out: int = 0):
        super().__init__(held_out)
        if rate < 1:
            raise ValueError(f"rate={rate} is not possible: give the samples a second of all files")
        self.folder, self.rate = folder, rate

    def open(self) -> list[str]:
        """Names of the WAV files, in order. Raises FileNotFoundError where there are none."""
        names = files_below(self.path("folder"), LeftOut())
        found = [each for each in names if each.lower().endswith(".wav") and not is_system_file(os.path.basename(each))]
        if not found:
            raise FileNotFoundError(f"{os.fspath(self.folder)!r} has no WAV files: correct source.folder")
        return found

    def __getitem__(self, number: int) -> Example:
        name = self.files[number]
        path, where = epath.Path(self.folder) / name, name
        try:
            rate, audio = read_wave(path)
        except (ValueError, OSError) as error:
            raise BadRow("the audio cannot be read", where, error) from error
        if rate != self.rate:
            raise BadRow("the audio has another rate", where, f"{rate:,} samples a second instead of {self.rate:,}")
        if audio.ndim != 1:
            raise BadRow("the audio has several channels", where, f"{audio.shape[1]}: make one of them")
        try:
            text = read_bounded(path.with_suffix(".txt"), TEXT, "text").decode("utf-8-sig")
        except (ValueError, OSError) as error:
            raise BadRow("the text cannot be read", where, error) from error
        return Example({"audio": audio, "text": " ".join(text.split())}, where)
