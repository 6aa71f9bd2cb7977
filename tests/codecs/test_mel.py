"""Mel spectrograms: a tone is in its band, the transform has an inverse, bad audio is refused."""

import numpy as np
import pytest

from src.codecs.mel import Mel, griffin_lim, istft, mel_filters, stft

MEL = Mel(frames=32, rate=8000, window=256, hop=128, bands=32, floor=1e-3)


def test_a_tone_has_the_closed_form_of_its_window():
    """A sine of amplitude 1 on a bin is 1 there, 1/2 beside it (Hann) and 0 elsewhere, so a band has the sum of its
    filter at three bins; the largest band is the one whose centre is nearest."""
    number = 20  # of the bin, 625 Hz
    wave = np.sin(2 * np.pi * number / MEL.window * np.arange(16 * MEL.hop))
    magnitude = np.abs(stft(wave, MEL.window, MEL.hop))[2:-2]
    wanted = np.zeros_like(magnitude)
    wanted[:, number - 1 : number + 2] = 0.5, 1.0, 0.5
    np.testing.assert_allclose(magnitude, wanted, atol=1e-12)
    filters = mel_filters(MEL)
    frames = MEL.encode(wave)[2:-2, 0]
    np.testing.assert_allclose(np.exp(frames), np.tile(np.maximum(filters @ wanted[0], 1e-3), (12, 1)), rtol=1e-5)
    mel = lambda hertz: 2595 * np.log10(1 + hertz / 700)
    centres = np.linspace(0, mel(4000), MEL.bands + 2)[1:-1]
    assert (frames.argmax(axis=1) == np.abs(centres - mel(625.0)).argmin()).all()
    bins = np.arange(129) * 8000 / 256
    inside = (mel(bins) >= centres[0]) & (mel(bins) <= centres[-1])
    np.testing.assert_allclose(filters.sum(axis=0)[inside], 1, atol=1e-12)


def test_transform_and_back():
    """Parseval for each window, and the inverse; Griffin & Lim find a waveform with about the same magnitudes."""
    wave = np.random.RandomState(0).standard_normal(16 * MEL.hop)
    spectrum = stft(wave, MEL.window, MEL.hop)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(MEL.window) / MEL.window)
    piece = np.pad(wave, 64, mode="reflect")[3 * 128 : 3 * 128 + 256] * hann
    both = np.abs(spectrum[3] * hann.sum() / 2) ** 2
    np.testing.assert_allclose((piece**2).sum(), (both[0] + 2 * both[1:-1].sum() + both[-1]) / 256)
    np.testing.assert_allclose(istft(spectrum, MEL.window, MEL.hop), wave, atol=1e-12)
    tone = 0.3 * np.sin(0.35 * np.arange(16 * MEL.hop)) + 0.1 * np.sin(0.8 * np.arange(16 * MEL.hop))
    magnitude = np.abs(stft(tone, MEL.window, MEL.hop))
    found = griffin_lim(magnitude, MEL.window, MEL.hop, rounds=120)
    error = np.abs(np.abs(stft(found, MEL.window, MEL.hop)) - magnitude)
    assert error.mean() < 0.04 * magnitude.mean()
    assert MEL.decode(MEL.encode(tone)).shape == tone.shape
    assert not MEL.decode(np.full((4, 1, 32), -20.0)).any()


@pytest.mark.parametrize(
    "wave, told",
    [
        (np.zeros((512, 2)), "one channel"),
        (np.full(512, np.nan), "512 of its samples are not finite"),
        (np.zeros(512), "all of its samples are 0"),
        (np.ones(100), "100 samples, and at least 256"),
        (np.ones(33 * 128), "less than 4,224"),
    ],
)
def test_bad_audio(wave, told):
    with pytest.raises(ValueError, match=told):
        MEL.encode(wave)


@pytest.mark.parametrize(
    "options, told",
    [({"hop": 129}, "even hop"), ({"high": 5000.0}, "half the rate"), ({"bands": 120}, "a band without a frequency")],
)
def test_bad_sizes(options, told):
    with pytest.raises(ValueError, match=told):
        Mel(**{"frames": 32, "rate": 8000, "window": 256, "hop": 128, "bands": 32} | options)
