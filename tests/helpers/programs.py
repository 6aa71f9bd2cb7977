"""Methods as one program each. Called as they are, each operation in them is compiled alone, which takes 20 ms."""

import functools

import jax


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _call(owner, name, fixed, values):
    return getattr(owner, name)(
        *(value if place is None else place for place, value in zip(fixed, values, strict=True))
    )


def compiled(method):
    """The method of an object that can be hashed; equal ones share their programs. Tuples are shapes, not arrays."""

    def call(*values):
        fixed = tuple(value if isinstance(value, tuple) else None for value in values)
        return _call(
            method.__self__,
            method.__name__,
            fixed,
            [v if f is None else None for v, f in zip(values, fixed, strict=True)],
        )

    return call
