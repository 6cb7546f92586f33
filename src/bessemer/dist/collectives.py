"""Two collectives of torch under one name: the older names, which torch 2.11 and 2.12 have alone, warn from 2.13 on."""

from __future__ import annotations

import torch.distributed as dist

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""(out, parts, group=, async_op=): the sum over the ranks of the part that is this rank's."""
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""(out, part, group=, async_op=): the parts of all ranks, one after the other."""
