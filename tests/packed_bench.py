"""Packed rows on a TPU that is not there: a config for `src.tools.aot`, and attention alone.

python -m src.tools.aot --config=tests/packed_bench.py --topology=v5e:2x4
python -m tests.packed_bench 8 2048          # rows, slots; a word more: with an array of the mask
"""

import json
import re
import sys

from src.tools.compile import topology

HEADS, KV_HEADS, HEAD, IMAGES, PATCHES = 32, 4, 64, 4, 256


def get_config(name=None):
    """The paper's trunk; rows of 2048 slots with up to 4 images of 256 patches that are generated."""
    from configs import common, papers

    config = papers.tinyllama(common.base())
    with config.unlocked():
        config.fields.image = common.image(32, 32, 4)
    config.batch = 32
    config.tasks = {
        "documents": {
            "weight": 1.0,
            "source": {"name": "documents", "folder": "data/documents"},
            "template": {"name": "packed", "length": 2048, "images": IMAGES},
            "objectives": {"diffusion": common.diffusion(), "text": common.next_token("text")},
        }
    }
    config.mesh.update({"fsdp": 8, "data": -1})
    return common.variant(config, name)


def attention(device, rows, slots, contiguous=True):
    """What the compiler of a chip makes of splash attention on packed rows, forward and backward, in bf16."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from src.interfaces import Batch, Packing, Tokens
    from src.models.attention import Sizes, prepare_attention
    from src.sequence.packed import PackedLayout
    from src.sequence.segment import Segment
    from src.tools.compile.cost import hbm_bytes

    segments = Segment("text", slots), Segment("image", PATCHES, "bidirectional", lead=1)
    layout = PackedLayout(segments, slots, (("image", IMAGES),))
    sizes = Sizes(rows, slots, slots, HEADS, KV_HEADS, HEAD, jnp.bfloat16, "tpu")

    def run(q, k, v, weight, there, image, example, begins):
        tokens = {"text": Tokens(there, there, there), "image": Tokens(image, image, image)}
        spec = layout.spec(Batch(tokens, packing=Packing(example, {"image": begins}))).replace(contiguous=contiguous)
        _, back = jax.vjp(prepare_attention("splash", spec, spec, sizes), q, k, v)
        return back(weight)

    mesh = jax.sharding.Mesh(np.array([device]), ("data",), axis_types=(AxisType.Auto,))
    array = lambda shape, kind: jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, PartitionSpec()))
    given = [array((rows, slots, n, HEAD), jnp.bfloat16) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    given += [array((rows, slots), bool), array((rows, IMAGES, PATCHES), bool)]
    given += [array((rows, slots), jnp.int32), array((rows, IMAGES), jnp.int32)]
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(*given).compile()
    text = compiled.as_text()
    numbers = re.findall(r"(?:pred|s\d+|u\d+)\[([\d,]+)\]", text)
    return {
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "bytes_of_arrays_read_and_written": hbm_bytes(text),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "loops": text.count(" while("),
        "largest_array_of_integers": max(int(np.prod([int(n) for n in dims.split(",")])) for dims in numbers),
    }


if __name__ == "__main__":
    topology.prepare("tpu", "v5e:2x2")
    chip = topology.open_topology("tpu", "v5e:2x2").devices[0]
    print(json.dumps(attention(chip, int(sys.argv[1]), int(sys.argv[2]), contiguous=len(sys.argv) < 4)))
