"""The attention mask of training, prefill, decoding and denoising."""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Bool

from src.interfaces import SequenceSpec


def visible(query: SequenceSpec, key: SequenceSpec) -> Bool[Array | np.ndarray, "*B Q K"]:
    """Attention mask of queries [Q] and keys [K]; numpy for numpy inputs, for kernels that need a static mask.

        visible(q, k) = segment_q == segment_k > 0  AND  (write_k <= read_q  OR  group_q == group_k > 0)  [AND relation]
                        [AND (write_k > read_q - window  OR  group_q == group_k > 0)], the sliding window of queries

    A causal prompt `a b`, a bidirectional image `x y`, then causal text `c` (rows: queries):

                a b x y c
        order   0 1 2 3 4        a | # . . . .
        group   0 0 1 1 0        b | # # . . .
                                 x | # # # # .
                                 y | # # # # .
                                 c | # # # # #
    """

    def pair(q, k):
        return q[..., :, None], k[..., None, :]

    segment_q, segment_k = pair(query.segment, key.segment)
    read, write = pair(query.read, key.write)
    group_q, group_k = pair(query.group, key.group)
    before = write <= read
    if query.window:
        before = before & (write > read - query.window)
    allowed = before | ((group_q == group_k) & (group_q > 0))
    allowed = allowed & (segment_q == segment_k) & (segment_k > 0)
    return allowed if query.relation is None else allowed & query.relation
