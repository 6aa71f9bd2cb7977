"""Fields for tests of the data: a codec each, without networks."""

from src.codecs.chain import Chain
from src.codecs.classes import Classes
from src.codecs.patch import Patch
from src.codecs.pixels import Pixels
from src.codecs.text import Bytes
from src.interfaces import Field


def field(name, *links):
    """A field of these links, those after the first as functions of the link in front."""
    built = []
    for link in links:
        built.append(link(before=built[-1]) if callable(link) and not hasattr(link, "where") else link)
    chain = Chain(tuple(built))
    return Field(name, chain.spec, chain)


def patches(size, **options):
    """The link `patch`, to be put behind another one."""
    return lambda before: Patch(size, before=before, **options)


def table(codec=None, size=(8, 8, 1), patch=2, classes=10, **more):
    """The fields text, image and label."""
    fields = {
        "text": field("text", codec or Bytes()),
        "image": field("image", Pixels(*size), patches(patch)),
        "label": field("label", Classes(classes)),
    }
    return fields | more
