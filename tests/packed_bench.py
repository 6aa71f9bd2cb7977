"""The paper's trunk on packed rows of words and images, for `src.tools.aot`; no files are needed to compile it.

python -m src.tools.aot --config=tests/packed_bench.py --topology=v5e:2x4
"""

from configs import common, papers


def get_config(name=None):
    """Rows of 2048 slots with up to 4 images of 256 patches that are generated."""
    config = papers.tinyllama(common.base())
    with config.unlocked():
        config.fields.image = common.image(32, 32, 4)
    config.batch = 32
    config.tasks = {
        "documents": {
            "weight": 1.0,
            "source": {"name": "documents", "folder": "data/documents"},
            "template": {"name": "packed", "length": 2048, "images": 4},
            "objectives": {"diffusion": common.diffusion(), "text": common.next_token("text")},
        }
    }
    config.mesh.update({"fsdp": 8, "data": -1})
    return common.variant(config, name)
