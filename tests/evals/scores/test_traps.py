"""What makes two scores of the same images differ: each is refused, or told beside the number."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image
from safetensors.numpy import load_file, save_file

from src.codecs.pixels import Pixels
from src.evals.networks import inception
from src.evals.scores import suite
from src.evals.scores.drawn_images import DrawnImages, draw
from src.tools import scores

GOLDEN = pathlib.Path(__file__).parents[2] / "golden/dinov2"
VALUES = np.random.default_rng(0).uniform(-1, 1, (40, 8, 8, 3)).astype(np.float32)
ROUNDED = Pixels(8, 8).decode(VALUES)


def drawn(folder, images=ROUNDED, **about):
    """A folder of `src.tools.draw`."""
    about = {"seed": 0, "ema": True, "guidance": {"scale": 1.5, "interval": [0.0, 1.0]}, "rounding": "nearest"} | about
    job = DrawnImages(epath.Path(folder), about, len(images), 16)
    draw(job, lambda rows, seed: images[rows.start : rows.stop], None, lambda done: None, True)
    return f"--images={folder}"


def score(capsys, folder, *flags, network="pixels"):
    """Exit code, report (None after an error), standard output, standard error."""
    path = folder / "scores.json"
    path.unlink(missing_ok=True)
    code = scores.main(["scores", f"--network={network}", f"--json={path}", *flags])
    said = capsys.readouterr()
    return code, json.loads(path.read_text()) if path.exists() else None, said.out, said.err


def test_rounding_is_to_the_nearest_and_told(tmp_path, capsys):
    """Truncation, as in ADM's samples, moves the mean by half a level, and the distance with it."""
    truncated = ((VALUES + 1) * 127.5).clip(0, 255).astype(np.uint8)
    assert (np.rint((VALUES + 1) * 127.5) == ROUNDED).all() and (truncated != ROUNDED).mean() > 0.4
    np.savez(tmp_path / "truncated.npz", truncated)
    flags = [drawn(tmp_path / "drawn"), f"--reference={tmp_path}/truncated.npz", "--metrics=fid"]
    _, report, said, _ = score(capsys, tmp_path, *flags)
    apart = (ROUNDED.astype(float) - truncated).mean(0) / 255
    assert report["scores"]["fid"] > 0.9 * (apart**2).sum() > 3e-4
    assert report["images"]["drawn"]["rounding"] == "nearest" and "'rounding': 'nearest'" in said
    _, report, _, _ = score(capsys, tmp_path, f"--images={tmp_path}/truncated.npz", *flags[1:])
    assert any("not known (guidance, average, steps, rounding)" in told for told in report["warnings"])


def test_jpeg_files_change_a_score_and_are_told(tmp_path, capsys):
    for name, options in (("png", {}), ("jpg", {"quality": 75})):
        (tmp_path / name).mkdir()
        for number, image in enumerate(ROUNDED):
            Image.fromarray(image).save(tmp_path / f"{name}/{number:02d}.{name}", **options)
    found = {}
    for name in ("png", "jpg"):
        flags = [f"--images={tmp_path}/{name}", f"--reference={tmp_path}/png", "--metrics=fid"]
        _, report, said, _ = score(capsys, tmp_path, *flags)
        found[name] = report["scores"]["fid"]
        assert ("40 of 40 images are JPEG files" in said) == (name == "jpg")
    assert found["png"] < 1e-9 and found["jpg"] > 1


def test_resizing_is_of_rounded_images_and_not_rounded_again():
    """The same images enlarged beforehand, whether by the same rule and rounded or by another, are other images."""
    images = jnp.asarray(ROUNDED[:2], jnp.float32)
    found = np.asarray(inception.resize(images, inception.SIDE))
    assert (found != np.rint(found)).mean() > 0.9
    again = inception.resize(jnp.rint(found), inception.SIDE)
    assert np.abs(np.asarray(again) - found).max() > 0.4, "rounded before"
    size = (inception.SIDE, inception.SIDE)
    cleaned = np.stack([np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BICUBIC)) for x in ROUNDED[:2]])
    assert np.abs(cleaned - found).mean() > 5, "as clean-fid does"


def test_statistics_of_other_weights_are_refused(tmp_path, capsys):
    """The same weights in another file are the same network."""
    for name in ("same", "other"):
        shutil.copytree(GOLDEN, tmp_path / name)
        tensors = load_file(GOLDEN / "model.safetensors")
        tensors["layernorm.bias"] = tensors["layernorm.bias"] + (name == "other")
        save_file(
            {name: each.astype(np.float64) for name, each in tensors.items()}, tmp_path / name / "model.safetensors"
        )
    images = drawn(tmp_path / "drawn")
    made = f"--write_statistics={tmp_path}/made.npz"
    code, _, _, said = score(capsys, tmp_path, images, made, f"--weights={GOLDEN}", network="dinov2")
    assert code == 0, said
    flags = [images, f"--reference={tmp_path}/made.npz", "--metrics=fid"]
    _, report, _, _ = score(capsys, tmp_path, *flags, f"--weights={tmp_path}/same", network="dinov2")
    assert report["scores"]["fd_dinov2"] < 1e-3 and report["reference"]["network"] == "this one"
    assert report["network"]["resizing"] == "224 x 224, bicubic as Pillow, rounded"
    code, _, _, said = score(capsys, tmp_path, *flags, f"--weights={tmp_path}/other", network="dinov2")
    assert code == 1 and said.count("\n") == 1 and "were made with other weights of the network" in said
    np.savez(tmp_path / "plain.npz", **{n: a for n, a in np.load(tmp_path / "made.npz").items() if n != "network"})
    flags[1] = f"--reference={tmp_path}/plain.npz"
    _, report, _, _ = score(capsys, tmp_path, *flags, f"--weights={tmp_path}/other", network="dinov2")
    assert report["reference"]["network"] == "not said in the file"


def test_a_file_without_spatial_moments_gives_no_sfid():
    suite.check_metrics(["fid"], "inception", "moments", ("pool",))
    with pytest.raises(ValueError, match="sfid needs moments of spatial features, which --reference does not have"):
        suite.check_metrics(["sfid"], "inception", "moments", ("pool",))


def test_few_images_are_told():
    network = type("Network", (), {"warning": ""})()
    assert any("fewer than 2,048" in told for told in suite.warnings_of(["fid"], 2047, network))
    assert len(suite.warnings_of(["fid"], 2048, network)) == 1 and not suite.warnings_of(["fid"], 50_000, network)


@pytest.mark.parametrize(
    ("expected", "told"),
    [
        ("guidance.scale=1.5,ema=true,rounding=nearest", ""),
        ("guidance.scale=1", "--expect=guidance.scale=1: the images were drawn with guidance.scale=1.5"),
        ("ema=false", "--expect=ema=false: the images were drawn with ema=true"),
        ("ema=1", "--expect=ema=1: the images were drawn with ema=true"),
        ("guidance.power=1", "about.json has no 'power', but scale, interval"),
        ("ema", "--expect=ema is no name=value"),
    ],
)
def test_guidance_and_average_that_are_not_those_named_are_refused(expected, told, tmp_path, capsys):
    flags = [drawn(tmp_path / "drawn"), f"--reference={tmp_path}/drawn", "--metrics=fid", f"--expect={expected}"]
    code, report, said, error = score(capsys, tmp_path, *flags)
    if not told:
        assert code == 0 and report["images"]["drawn"]["guidance"]["scale"] == 1.5 and "'scale': 1.5" in said
        np.savez(tmp_path / "any.npz", ROUNDED)
        code, _, _, error = score(capsys, tmp_path, f"--images={tmp_path}/any.npz", *flags[1:])
        told = "the folder has no about.json, which says what its images were drawn with"
    assert code == 1 and error.count("\n") == 1 and told in error
