"""A reward model's network: the same body with a scalar head instead of the vocabulary's (R1, Nature 2025, Methods).

On disk it is transformers' `DeepseekV3ForSequenceClassification` with one label: `score.weight` instead of
`lm_head.weight`, no MTP layers. The score of a text is read at its last token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bessemer.errors import UserError
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer


class Scorer(Transformer):
    """`scorer(tokens_BT)` gives the score of every prefix, [B, T] float32."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg.model_copy(update={"n_mtp": 0}))
        del self.head
        self.score = nn.Linear(cfg.dim, 1, bias=False)

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, seed: int) -> Scorer:
        """A copy of a language model's body with a new head."""
        if not isinstance(model, Transformer):
            raise UserError(
                f"a reward model starts from a network of the DeepSeek family, not from {type(model).__name__}; use a "
                "model that this program trained or read as deepseek_v3 or deepseek_v2"
            )
        device, dtype = model.embed.weight.device, model.embed.weight.dtype
        scorer = cls(model.cfg).to_compute(dtype).to(device)
        body = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(("head.", "mtp."))}
        missing = scorer.load_state_dict(body, strict=False)
        assert missing == (["score.weight"], []), missing
        fresh = torch.empty(scorer.score.weight.shape, dtype=torch.float32)
        fresh.normal_(0.0, model.cfg.init_std, generator=torch.Generator().manual_seed(seed))
        scorer.score.weight.copy_(fresh)
        return scorer

    def forward(self, tokens_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        return self.scores(self.norm(self.hidden(tokens_BT, segments_BT)))

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores [...] of hidden states [..., D] after the final norm, in float32: two answers differ by little."""
        return hidden.float() @ self.score.weight.float().squeeze(0)
