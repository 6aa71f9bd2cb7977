"""WAV files with texts: what is read, and one sentence for each kind of file that cannot be used."""

import numpy as np
import pytest
from scipy.io import wavfile

from src.data.example import BadRow
from src.data.sources.recordings import Recordings

WAVE = np.sin(np.arange(800) / 7)


@pytest.fixture
def folder(tmp_path):
    files = {
        "a/long": (8000, WAVE * 30_000, np.int16),
        "bytes": (8000, WAVE * 120 + 128, np.uint8),
        "double": (8000, WAVE, np.float64),
        "rate": (44_100, WAVE, np.float32),
        "stereo": (8000, np.stack([WAVE, WAVE], axis=1), np.float32),
        "untold": (8000, WAVE, np.float32),
    }
    for name, (rate, samples, kind) in files.items():
        path = tmp_path / f"{name}.wav"
        path.parent.mkdir(exist_ok=True)
        wavfile.write(path, rate, samples.astype(kind))
        if name != "untold":
            path.with_suffix(".txt").write_text(f"{name}  said\n")
    (tmp_path / "torn.wav").write_bytes(b"RIFF\x00\x00\x00\x00WAVEfmt ")
    (tmp_path / "._bytes.wav").write_bytes(b"")
    return tmp_path


def test_recordings(folder):
    source = Recordings(folder, rate=8000, held_out=1)
    names = [*source.files]
    assert sorted(names) == [f"{n}.wav" for n in ("a/long", "bytes", "double", "rate", "stereo", "torn", "untold")]
    for name, told in (("a/long", "a/long said"), ("bytes", "bytes said"), ("double", "double said")):
        example = source[names.index(f"{name}.wav")]
        assert example["text"] == told and example["audio"].dtype == np.float32
        size = {"a/long": 30_000 / 2**15, "bytes": 120 / 128, "double": 1.0}[name]
        np.testing.assert_allclose(example["audio"], size * WAVE, atol=0.01)
    for name, told in (
        ("rate", r"rate.wav: the audio has another rate \(44,100 samples a second instead of 8,000\)"),
        ("stereo", r"several channels \(2: make one"),
        ("torn", "it is no WAV file"),
        ("untold", "the text cannot be read .*untold.txt.* does not exist"),
    ):
        with pytest.raises(BadRow, match=told):
            source[names.index(f"{name}.wav")]


def test_no_recordings(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no WAV files"):
        len(Recordings(tmp_path))
    with pytest.raises(ValueError, match="rate=0"):
        Recordings(tmp_path, rate=0)
