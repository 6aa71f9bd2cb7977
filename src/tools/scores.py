"""Scores generated images: FID, sFID, inception score, KID, precision and recall, each with what it depends on.

python -m src.tools.scores --images=drawn --network=inception --weights=pt_inception-2015-12-05-6726825d.pth \\
    --reference=VIRTUAL_imagenet256_labeled.npz --json=scores.json
python -m src.tools.scores --images=real/ --network=inception --weights=… --write_statistics=real.npz
python -m src.tools.scores --images=drawn --network=dinov2 --weights=dinov2-large --reference=real/
python -m src.tools.scores --images=drawn --network=clip --weights=clip-vit-large-patch14 --prompts=prompts.txt
python -m src.tools.scores --images=drawn --network=pixels --reference=real/ --metrics=fid,kid

--images and --reference are folders that `src.tools.draw` wrote, folders of image files of one size, or .npz files of
samples as ADM's evaluator takes them; --reference may also be an .npz of moments. The report names the images, the
network's file and the reference by their digests, and warns of what makes the numbers differ from published ones
(docs/scores.md). All devices compute features, those of all processes, too, each of its share of the images.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from absl import flags

from src.common.runtime import command, config_flag

DEFAULT = ["fid", "sfid", "is", "precision_recall"]
NETWORKS = ["inception", "dinov2", "clip", "pixels"]


def define() -> flags.FlagValues:
    """The flags."""
    values = flags.FlagValues()
    common = {"flag_values": values}
    flags.DEFINE_string("images", None, "The images that are scored.", **common)
    flags.DEFINE_string("reference", None, "Real images, or a file of their moments.", **common)
    flags.DEFINE_enum("network", "inception", NETWORKS, "Whose features are compared.", **common)
    flags.DEFINE_string("weights", None, "The file or folder of the network.", **common)
    flags.DEFINE_string("prompts", None, "For clip_score: what the images were drawn from.", **common)
    flags.DEFINE_list("metrics", None, "Of fid, sfid, is, kid, precision_recall, clip_score.", **common)
    flags.DEFINE_list("expect", [], "What they must be drawn with, as guidance.scale=1.5,ema=true.", **common)
    flags.DEFINE_integer("splits", 10, "Parts of the images for the inception score.", 1, **common)
    flags.DEFINE_integer("seed", 0, "Of the random subsets of kid.", 0, **common)
    flags.DEFINE_string("write_statistics", None, "A file that gets the moments of --images.", **common)
    flags.DEFINE_boolean("with_images", False, "--write_statistics: the images, too, as in ADM's files.", **common)
    flags.DEFINE_string("json", None, "A file that gets the report.", **common)
    flags.DEFINE_boolean("traceback", False, "Show the whole traceback of an error.", **common)
    return values


def main(argv: list[str]) -> int:
    """The exit code."""
    values = define()

    def work() -> None:
        config_flag.parse_plain(values, argv, "images")
        run(values)

    return command.run(work, values)


def run(values: flags.FlagValues) -> None:
    """Scores what the flags say, and prints the report."""
    from src.common.mesh import distributed

    if not values.images:
        raise ValueError(
            "give --images, the folder or .npz of the images, and --reference, what they are compared with"
        )
    distributed.start()
    from src.evals.scores import suite
    from src.evals.scores.drawn_images import check_expected
    from src.evals.scores.image_sets import open_images, open_reference
    from src.evals.scores.prompts import ImagePrompts
    from src.evals.scores.statistics import write_statistics

    images = open_images(values.images)
    check_expected(images.about.get("drawn"), values.expect)
    network = _network(values, images)
    reference, moments = open_reference(values.reference, network)
    kind = "images" if reference else "moments" if moments else ""
    prompts = ImagePrompts(values.prompts, images.about.get("drawn")) if values.prompts else None
    default = ["clip_score"] if values.network == "clip" else DEFAULT
    check = lambda names: suite.check_metrics(names, values.network, kind, moments, prompts is not None)
    names = values.metrics or [name for name in default if _can(check, name)]
    check(names)
    if values.write_statistics:
        suite.check_metrics(["fid"], values.network, "images")
    if not names and not values.write_statistics:
        raise ValueError("nothing is asked for: give --reference, --metrics or --write_statistics")
    has_spatial = "spatial" in network.outputs
    kept = (["fid", "sfid"] if has_spatial else ["fid"]) if values.write_statistics else []
    made = suite.look(images, network, [*names, *kept], _teller("images"))
    if values.write_statistics and distributed.is_first():
        spatial = suite.statistics_of(made, "spatial") if has_spatial else None
        kept_images = images.blocks if values.with_images else None
        pool = suite.statistics_of(made, "pool")
        write_statistics(values.write_statistics, pool, spatial, network.identity(), kept_images)
        _say(f"the moments of {made.count:,} images are in {values.write_statistics}")
    real, moments = suite.look_at_reference(reference, moments, names, network, _teller("real images"))
    texts = network.texts(prompts.lines)[prompts.of_images(made.count)] if "clip_score" in names else None
    found = suite.scores(names, made, moments, real, splits=values.splits, seed=values.seed, texts=texts)
    warnings = suite.warnings_of(names, made.count, images, reference, network)
    if "drawn" not in images.about:
        warnings.append("what the images were drawn with is not known (guidance, average, steps, rounding)")
    report = {
        "scores": suite.named(found, network),
        "images": images.about | {"count": made.count},
        "reference": _told_reference(values, real),
        "network": network.about,
        "prompts": prompts and prompts.about,
        "warnings": warnings,
    }
    if distributed.is_first():
        _show(values, report)
    distributed.stop()


def _network(values: flags.FlagValues, images: Any) -> Any:
    from src.evals.scores import networks

    _, height, width, _ = next(images.blocks()).shape
    return networks.open_network(values.network, values.weights, height, width)


def _can(check: Any, name: str) -> bool:
    try:
        check([name])
    except ValueError as error:
        _say(f"left out: {error}")
        return False
    return True


def _told_reference(values: flags.FlagValues, real: Any) -> dict[str, Any] | None:
    from src.common.files.npz import Npz
    from src.evals.scores.networks import sha256
    from src.evals.scores.statistics import NETWORK, outputs_of

    if not values.reference:
        return None
    told: dict[str, Any] = {"path": values.reference}
    if real is not None:
        told["count"] = real.count
    if os.path.isfile(values.reference):
        told["sha256"] = sha256(values.reference)
        if outputs_of(values.reference):
            told["network"] = "this one" if NETWORK in Npz(values.reference).names() else "not said in the file"
    return told


def _show(values: flags.FlagValues, report: dict[str, Any]) -> None:
    for name, value in report["scores"].items():
        print(f"{name:<12}{value:,.4f}")
    drawn = report["images"].get("drawn", {})
    kept = ("config", "step", "ema", "weights", "guidance", "decode", "seed", "rounding", "classes", "prompts")
    settings = {name: drawn[name] for name in kept if name in drawn}
    print(f"images      {report['images']['count']:,} of {report['images']['path']} {settings or ''}".rstrip())
    print(f"reference   {report['reference'] or 'none'}\nnetwork     {report['network']}")
    for told in report["warnings"]:
        print(f"warning: {told}")
    if values.json:
        from src.common.files.store import write_named

        write_named(values.json, (json.dumps(report, indent=2) + "\n").encode(), "report")
        print(f"written to {values.json}")


def _teller(what: str) -> Any:
    last = 0

    def told(count: int) -> None:
        nonlocal last
        if count >= last + 1000:
            last = count
            _say(f"{count:,} {what}")

    return told


def _say(text: str) -> None:
    from src.common.mesh.distributed import is_first

    if is_first():
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
