"""The synthetic voice: its sound has the closed form, its judge misreads none of its renderings and tells faults."""

import functools

import numpy as np
import pytest

from src.codecs.mel import Mel
from src.data.sources import voice
from src.data.sources.voice import COUNT, HELD_OUT, NEW_SPEAKERS, SPEAKERS, Voice, distance, merged, speaker

MEL = Mel(frames=64, rate=8000, window=256, hop=128, bands=32, floor=1e-3)


@functools.cache
def source():
    return Voice(mel=MEL)


def rendered(example, speaker=None):
    """The frames of what an example asks for, by its own speaker or another, behind the place of its `voice`."""
    scale, pitch = speaker or (example["scale"], example["pitch"])
    frames = MEL.encode(source().wave(example["labels"], scale, pitch))
    return np.concatenate([np.zeros((16, 1, 32), np.float32), frames])


def test_the_sound_of_a_symbol():
    """A long symbol has its harmonics' amplitudes (by the transform of whole periods), and the wanted power."""
    pitch = 125.0  # 64 samples
    wave = source().wave(np.full(60, 2), 1.0, pitch)
    found = np.abs(np.fft.rfft(wave[:6400])) / 3200
    np.testing.assert_allclose(found[100:3200:100], voice._amplitudes(1.0, pitch, 8000)[2][:31], atol=1e-5)
    np.testing.assert_allclose(np.sqrt((wave[:6400] ** 2).mean()), voice.POWER, rtol=1e-3)


def test_the_judge_misreads_none_and_tells_faults():
    """0 of these misread (0 of 500 when it was written); a second rendering is right with other durations; another
    speaker, another order, the mean of all frames and noise are not."""
    examples = [source()[COUNT + number] for number in range(4)]
    right = [source().judged(each, rendered(each)) for each in examples]
    assert all(each["right"] == 1 and each["symbol_error"] == 0 for each in right)
    assert max(each["left"] for each in right) < 0.1 and max(each["duration_error"] for each in right) < 0.05
    first = examples[0]
    made, real = source().features(first, rendered(first))
    assert made.shape == (12, 128) and (made == real).all()
    heard = MEL.encode(MEL.decode(MEL.encode(source().wave(first["labels"], first["scale"], first["pitch"]))))
    assert source().judged(first, np.concatenate([np.zeros((16, 1, 32)), heard]))["right"] == 1
    other = source().judged(first, rendered(first, speaker(SPEAKERS + 4)))
    assert (other["symbol_error"], other["same_speaker"], other["right"]) == (0, 0, 0)
    turned = source().judged(first, np.concatenate([np.zeros((16, 1, 32)), rendered(first)[:15:-1]]))
    assert turned["symbol_error"] > 0.3 and turned["same_speaker"] == 1
    flat = source().judged(first, np.broadcast_to(rendered(first)[16:].mean(axis=0), (64, 1, 32)))
    noise = source().judged(first, np.random.RandomState(0).standard_normal((64, 1, 32)) * 1.6 - 5)
    assert min(flat["left"], noise["left"]) > 0.2 and flat["right"] == noise["right"] == 0
    assert source().judged(first, np.full((64, 1, 32), np.nan))["right"] == 0


def test_the_splits_share_neither_speakers_nor_texts():
    examples = [source()[number] for number in (*range(8), *range(COUNT, COUNT + 4))]
    speakers = [speaker(number) for number in range(SPEAKERS + NEW_SPEAKERS)]
    assert len(set(speakers)) == len(speakers)
    for numbers, part in ((range(SPEAKERS), examples[:8]), (range(SPEAKERS, len(speakers)), examples[8:])):
        assert {(each["scale"], each["pitch"]) for each in part} <= {speakers[number] for number in numbers}
    texts = [{each["text"] for each in part} for part in (examples[:8], examples[8:])]
    assert len(source()) == COUNT + HELD_OUT and not texts[0] & texts[1]
    for each in examples:
        runs = np.diff(np.flatnonzero(np.diff(each["labels"], prepend=-1, append=-1)))
        assert set(runs) <= set(voice.DURATIONS) and merged(each["labels"]) == each["text"]
        assert len(each["audio"]) == len(each["labels"]) * MEL.hop
        if "voice" in each:
            assert len(each["voice"]) == 16 * MEL.hop and len(each["labels"]) == 48
    again = source()[COUNT + 3]
    np.testing.assert_array_equal(again["audio"], examples[11]["audio"])


def test_edits_and_runs():
    assert [distance(a, b) for a, b in (("", "aei"), ("aei", "aei"), ("aei", "aoi"), ("aei", "ai"))] == [3, 0, 1, 1]
    costs = np.ones((8, 3))
    costs[:4, 0] = costs[4:, 1] = 0
    costs[2, 0] = 1.5  # a single frame that looks like something else is no run
    assert voice.cheapest_runs(costs, 3, 0.2).tolist() == [0] * 4 + [1] * 4
    with pytest.raises(ValueError, match="voice=4"):
        Voice(mel=MEL, voice=4)
