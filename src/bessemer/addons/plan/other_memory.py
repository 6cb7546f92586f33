"""Bytes of a rank that trains a model of another family, by kind.

On one process an `Optimizer` holds flat vectors: weights in the compute dtype, float32 gradients, masters unless the
weights are float32 already, two moments. On several, FSDP2 shards everything (`distributed.fsdp`): the shards are the
float32 masters, and layers are gathered in the compute dtype. With adapters only these have gradients and moments.

    weights, gradients, masters, moments    exact, for the rank with the largest part of every tensor
    activations    what forward saves for backward (`other_models`), on a GPU or a CPU
    working        an estimate: the gathered root (embedding, head) with its gradient, two gathered layers with the
                   gradients of one, a recomputed layer, or one chunk of logits; the most that is there at a time
"""

from __future__ import annotations

import math

from bessemer.addons.plan.other_models import OtherModel


def training(
    model: OtherModel, ranks: int, rows: int, length: int, number: int, moments: int, recompute: bool = False,
    adapter_rank: int = 0, on_gpu: bool = True,
) -> dict[str, int]:  # fmt: skip
    """`number`, `moments`: bytes of the compute dtype and of a moment; `adapter_rank`: of LoRA, 0 without."""
    share = model.shard(ranks)
    trained = model.adapters(adapter_rank, ranks) if adapter_rank else share
    by_kind = {"weights": 0, "gradients": 4 * trained, "masters": 0, "moments": 2 * moments * trained}
    if ranks == 1:
        by_kind["weights"] = number * (share + (trained if adapter_rank else 0))
        by_kind["masters"] = 4 * trained * (number < 4)
    elif adapter_rank:
        by_kind["weights"] = number * share + 4 * trained
    else:
        by_kind["weights"] = 4 * share
    by_kind["activations"] = model.activations(rows, length, number, recompute, adapter_rank)
    by_kind["working"] = working(model, ranks, rows, length, number, recompute, adapter_rank, on_gpu)
    return by_kind


def working(
    model: OtherModel, ranks: int, rows: int, length: int, number: int, recompute: bool, adapter_rank: int, on_gpu: bool
) -> int:
    tokens = rows * length
    chunk = min(tokens, max(128, (1 << 27 if on_gpu else 1 << 18) // model.vocab))
    head = 0 if adapter_rank else model.vocab * model.dim * (4 + (number if number < 4 else 0))
    loss = chunk * model.vocab * (8 + number) + head
    layer = model.layer_activations(tokens, number, adapter_rank, bool(adapter_rank)) if recompute else 0
    if ranks == 1:
        return max(loss, layer)
    per_layer = sum(map(math.prod, model.layer_tensors()))
    root = sum(map(math.prod, model.root_tensors()))
    gathered = number * (root + 2 * per_layer)
    if adapter_rank:
        return max(loss + number * root, layer + gathered)
    return max(loss + number * root, layer + gathered + number * root + (4 + number) * per_layer)
