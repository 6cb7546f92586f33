"""The tokens that truncation (top-p, top-k, min-p) kept when each token of a sample was drawn: DeepSeek-V3.2's sampling
mask (3.1), as lists of ids.

Few tokens are kept where the policy is sure, most of the vocabulary where it is not, so the lists are ragged: 4 bytes
for each kept id and 4 for each token of a sample.

Shapes: B rows, V vocabulary, T tokens of a sample, M ids kept at all of them.
"""

from __future__ import annotations

from array import array
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class KeptTokens(NamedTuple):
    """The kept tokens of one sample."""

    id_M: Tensor
    """int32: the ids kept at the first token, in ascending order, then those at the second, and so on."""
    count_T: Tensor
    """int32: how many ids each token was drawn from."""

    @classmethod
    def of(cls, ids: array[int], counts: array[int]) -> KeptTokens:
        return cls(*(torch.from_numpy(np.array(numbers, dtype=np.int32)) for numbers in (ids, counts)))


def ids_of_mask(kept_BV: Tensor) -> list[list[int]]:
    """The ids of every row of a mask on the CPU."""
    rows, vocab = kept_BV.shape
    row_N, id_N = np.divmod(np.flatnonzero(kept_BV.numpy()), vocab)
    ids: list[int] = id_N.tolist()
    ends = accumulate(np.bincount(row_N, minlength=rows).tolist(), initial=0)
    return [ids[start:stop] for start, stop in pairwise(ends)]
