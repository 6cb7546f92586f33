"""A slice of the network: some of its layers; the embedding before the first; norm, head, MTP modules after the last.

Parameters keep the names they have in the whole network (`layers.17.attn.wo.weight`), whatever slice they are in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.model.config import ModelConfig
from bessemer.model.transformer import TrainOutputs, Transformer


def cut(cfg: ModelConfig, stages: int) -> list[range]:
    """Layers of every stage, as even as can be; MTP modules count as layers of the last stage."""
    blocks = cfg.n_layers + cfg.n_mtp
    ends = [blocks * (stage + 1) // stages for stage in range(stages)]
    return [range(begin, min(end, cfg.n_layers)) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


class Slice(nn.Module):
    """Stage number `stage` of `stages`; shares its modules with the `model` it is cut from."""

    def __init__(self, model: Transformer, stage: int, stages: int):
        super().__init__()
        self.first, self.last = stage == 0, stage == stages - 1
        self.width, self.dtype, self.rope_table = model.cfg.dim, model.embed.weight.dtype, model.rope_table
        self.cuts, self.n_mtp = cut(model.cfg, stages), len(model.mtp)
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in self.cuts[stage]})
        self.mtp = model.mtp if self.last else nn.ModuleList()
        self.embed = model.embed if self.first or len(self.mtp) else None
        self.norm, self.head = (model.norm, model.head) if self.last else (None, None)

    def owners(self, name: str) -> set[int]:
        """Stages whose slices have the parameter of this name."""
        if name.startswith("layers."):
            number = int(name.split(".")[1])
            return {stage for stage, layers in enumerate(self.cuts) if number in layers}
        last = len(self.cuts) - 1
        return {0, last} if name.startswith("embed.") and self.n_mtp else {0} if name.startswith("embed.") else {last}

    def forward(self, x: Tensor, segments_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(residual stream after the slice [B, T, D], balance term). x: tokens [B, T] at the first stage."""
        if self.first:
            x = self.embed(x)
        balance = torch.zeros((), dtype=torch.float32, device=x.device)
        table = self.rope_table(x.shape[1])
        for layer in self.layers.values():
            x, term = layer(x, table, segments_BT)
            if term is not None:
                balance = balance + term
        return x, balance

    def outputs(self, x_BTD: Tensor, balance: Tensor, tokens_BT: Tensor, segments_BT: Tensor | None) -> TrainOutputs:
        """Of the last stage: `Transformer.train_outputs`, with the balance term of this slice alone."""
        hidden = self.norm(x_BTD)
        h, depths = hidden, []
        for k, module in enumerate(self.mtp, start=1):
            T = tokens_BT.shape[1] - k
            segments = None if segments_BT is None else segments_BT[:, :T]
            embedded = F.embedding(tokens_BT[:, k:], self.embed.weight)
            h, term = module(h[:, :T], embedded, self.rope_table(T), segments)
            balance = balance + term
            depths.append(module.norm(h))
        return TrainOutputs(hidden, depths, balance)
