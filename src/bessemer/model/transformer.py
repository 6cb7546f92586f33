"""The whole network: embedding, layers, final norm, head and MTP modules (V3 2).

Plain math on one device. `model(tokens)` returns logits; `train_outputs` returns what the objectives need without ever
materialising all logits.

Multi-token prediction (V3 2.2): module k predicts token i+k+1 from h^{k-1}_i and the embedding of token i+k.

    h'_i = M_k [RMSNorm_e(Emb(t_{i+k})) ; RMSNorm_h(h^{k-1}_i)]      embedding first, as the released eh_proj expects
    h^k  = Block_k(h')                                               one full MLA + MoE layer
    P^k  = softmax(W_head RMSNorm_out(h^k))                          embedding and head shared with the main model

h^0 is the main model's output after its final norm, as released weights expect (the paper leaves it open).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.errors import UserError
from bessemer.model.accounting import flops_per_token
from bessemer.model.config import ModelConfig
from bessemer.model.gate import Gate
from bessemer.model.layer import PHASES, Layer, Phase
from bessemer.model.mla import rope_table
from bessemer.model.norm import RMSNorm
from bessemer.model.ops import Linear
from bessemer.model.protocol import LanguageModel, TrainOutputs
from bessemer.model.segments import Segments, first_tokens

RECOMPUTES_ITSELF = "training in FP8 already recomputes norms, gates and activations; set recompute = []"

APART = 20e9
"""From this many parameters on, every matrix has its own random stream. Drawing V3's 671B numbers from one stream takes
every rank more than an hour, and it keeps a thousandth of them."""


class MTPModule(nn.Module):
    """The module of one prediction depth (V3 2.2)."""

    apart: bool = False
    """Its loss trains it alone: no gradient reaches the network before it, nor the embedding."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.enorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.hnorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.eh_proj = Linear(2 * cfg.dim, cfg.dim)  # M_k
        self.layer = Layer(cfg, dense=False)
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)  # shared_head.norm on disk: its own gain despite the name

    def join(self, h_BTD: Tensor, embedded_BTD: Tensor) -> Tensor:
        """Input of the block; position i holds h^{k-1}_i and the embedding of token i+k."""
        if self.apart:
            h_BTD, embedded_BTD = h_BTD.detach(), embedded_BTD.detach()
        return self.eh_proj(torch.cat((self.enorm(embedded_BTD), self.hnorm(h_BTD)), -1))

    def forward(
        self, h_BTD: Tensor, embedded_BTD: Tensor, rope: Tensor, segments: Segments = None
    ) -> tuple[Tensor, Tensor]:
        """(h^k [B, T, D] before the output norm, balance term)."""
        return self.layer(self.join(h_BTD, embedded_BTD), rope, segments)


class Transformer(LanguageModel):
    """A network of the DeepSeek V2/V3 family."""

    readout: ClassVar[str] = "head"
    """Name of the matrix that reads the hidden states after the final norm."""
    cfg: ModelConfig
    # nn.ModuleLists; torch does not declare that class as generic
    layers: Sequence[Layer]
    mtp: Sequence[MTPModule]

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        # not nn.Embedding(V, D): on meta tensors its initialisation imports torch's compiler, 1.5 s at every start
        self.embed = nn.Embedding.from_pretrained(torch.rand(cfg.vocab_size, cfg.dim), freeze=False)
        layers = (Layer(cfg, dense=i < cfg.n_dense_layers) for i in range(cfg.n_layers))
        self.layers = cast(Sequence[Layer], nn.ModuleList(layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.head = Linear(cfg.dim, cfg.vocab_size)
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight
        self.mtp = cast(Sequence[MTPModule], nn.ModuleList(MTPModule(cfg) for _ in range(cfg.n_mtp)))
        self._rope: Tensor | None = None

    @torch.no_grad()
    def initialise(self, seed: int) -> Self:
        """Draws every matrix from Normal(0, init_std), the same on every device; norms and routing biases stay."""
        parameters = dict(self.named_parameters())
        for name, expert, values in self.initial_values(seed):
            parameter = parameters[name]
            (parameter if expert is None else parameter[expert]).copy_(values)
        return self

    def initial_values(
        self, seed: int, selects: Callable[[str, int | None], bool] = lambda name, expert: True
    ) -> Iterator[tuple[str, int | None, Tensor]]:
        """Yields (parameter name, expert, initial values) of every matrix. Stacked experts come one by one if that
        gives the same numbers as all at once (the generator works in blocks of 16); otherwise expert is None.

        A model of `APART` parameters or more seeds the generator for every matrix and expert from seed, name and
        expert, and draws only what is `selects`; a smaller model draws all its numbers from one stream."""
        generator = torch.Generator().manual_seed(seed)
        apart = sum(parameter.numel() for parameter in self.parameters()) >= APART
        for name, parameter in self.named_parameters():
            one_by_one = parameter.dim() == 3 and (apart or parameter[0].numel() % 16 == 0)
            for expert in range(len(parameter)) if one_by_one else (None,):
                shape = parameter.shape if expert is None else parameter.shape[1:]
                if parameter.dim() < 2 or (apart and not selects(name, expert)):
                    continue
                if apart:
                    digest = hashlib.sha256(f"{seed} {name} {expert}".encode()).digest()
                    generator.manual_seed(int.from_bytes(digest[:8]) >> 1)
                fresh = torch.empty(shape, dtype=torch.float32)
                yield name, expert, fresh.normal_(0.0, self.cfg.init_std, generator=generator)

    def to_compute(self, dtype: torch.dtype) -> Self:
        """Casts the matrices to the compute dtype; norm gains, gates and routing biases stay float32 (V3 3.3.1)."""
        for module in self.modules():
            if isinstance(module, (RMSNorm, Gate)):
                continue
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
        return self

    def set_recompute(self, phases: Iterable[Phase]) -> Self:
        """Makes training recompute these phases of every layer in backward (`layer`). Raises UserError if a phase does
        not exist or is communication, and in FP8, which has its own recomputation ("route")."""
        chosen = frozenset(phases)
        for phase in sorted(chosen - set(PHASES)):
            raise UserError(f'phase "{phase}" cannot be recomputed in backward; choose from {", ".join(PHASES)}')
        layers = [module for module in self.modules() if isinstance(module, Layer)]
        if chosen and any("route" in layer.recompute for layer in layers):
            raise UserError(RECOMPUTES_ITSELF)
        for layer in layers:
            layer.recompute = chosen | (layer.recompute & {"route"})
        return self

    @property
    def head_weight(self) -> Tensor:
        return getattr(self, self.readout).weight

    def hidden_matrices(self) -> dict[str, int]:
        """Maps the name of every matrix inside the layers, except gates, to the number of matrices stacked along its
        rows: 2 if one tensor holds w1 and w3."""
        layers = [(f"layers.{i}", layer) for i, layer in enumerate(self.layers)]
        layers += [(f"mtp.{k}.layer", module.layer) for k, module in enumerate(self.mtp)]
        return {
            f"{place}.{name}": 2 if "w13" in name else 1
            for place, layer in layers
            for name, parameter in layer.named_parameters()
            if parameter.dim() >= 2 and not name.startswith("ffn.gate.")
        }

    def gates(self) -> dict[str, Gate]:
        """Every gate by the name of its layer: '3' for layer 3, 'mtp0' for the first MTP module."""
        gates = {str(i): layer.sparse_ffn.gate for i, layer in enumerate(self.layers) if not layer.dense}
        return gates | {f"mtp{k}": module.layer.sparse_ffn.gate for k, module in enumerate(self.mtp)}

    def rope_table(self, length: int) -> Tensor:
        """`mla.rope_table` of `length` positions, [length, R/2, 2], on the model's device. It grows to twice its size
        or more, since decoding asks for one position more at every token."""
        device = next(self.parameters()).device
        if self._rope is None or self._rope.shape[0] < length or self._rope.device != device:
            grown = min(self.cfg.max_seq_len, 4096 if self._rope is None else 2 * len(self._rope))
            with torch.inference_mode(False):  # the table outlives the caller's mode, and training saves it
                self._rope = rope_table(self.cfg, max(length, grown), device)
        return self._rope[:length]

    def hidden(self, tokens_BT: Tensor, segments: Segments = None) -> Tensor:
        """Residual stream after the last layer, before the final norm, [B, T, D]."""
        return self._run(tokens_BT, segments)[0]

    def forward(self, tokens_BT: Tensor, segments: Segments = None) -> Tensor:
        """Logits of the next token, [B, T, V]."""
        return self.head(self.norm(self.hidden(tokens_BT, segments)))

    def _run(self, tokens_BT: Tensor, segments: Segments, choice_BTLK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        table = self.rope_table(tokens_BT.shape[1])
        x = self.embed(tokens_BT)
        balance = torch.zeros((), dtype=torch.float32, device=x.device)
        choices = () if choice_BTLK is None else choice_BTLK.flatten(0, 1).unbind(1)
        assert len(choices) in (0, sum(not layer.dense for layer in self.layers)), "one choice for every sparse layer"
        left = iter(choices)
        for layer in self.layers:
            x, term = layer(x, table, segments, None if layer.dense else next(left, None))
            if term is not None:
                balance = balance + term
        return x, balance

    def train_outputs(
        self, tokens_BT: Tensor, segments: Segments = None, mtp: bool = True, choice_BTLK: Tensor | None = None
    ) -> TrainOutputs:
        x, balance = self._run(tokens_BT, segments, choice_BTLK)
        hidden = self.norm(x)
        modules = self.mtp if mtp else ()
        depths, term = mtp_states(modules, hidden, tokens_BT, segments, self.embed.weight, self.rope_table)
        return TrainOutputs(hidden, depths, balance + term)

    @torch.no_grad()
    def chosen_experts(self, tokens_BT: Tensor, segments: Segments = None) -> Tensor:
        rope = self.rope_table(tokens_BT.shape[1])
        x_BTD, choices = self.embed(tokens_BT), []
        for layer in self.layers:
            attended = layer.attend(x_BTD, rope, segments)
            if attended.routing is not None:
                choices.append(attended.routing.expert_NK.view(*tokens_BT.shape, -1))
            x_BTD = layer.feed_forward(attended)
        return torch.stack(choices, 2)

    def training_flops(self, length: int, mtp: bool) -> float | None:
        return flops_per_token(self.cfg, length, mtp=mtp).training

    def scorer(self, seed: int) -> Scorer:
        return Scorer.of(self, seed)

    def save(self, directory: str | Path, **options: Any) -> None:
        """Writes a Hugging Face model directory; options as for `bessemer.hf.deepseek.save`. That module is found by
        name when it is needed, because the network itself knows nothing about file formats."""
        import_module("bessemer.hf.deepseek").save(self, directory, **options)


def mtp_states(
    modules: Iterable[MTPModule], hidden_BTD: Tensor, tokens_BT: Tensor, segments: Segments,
    embedding_VD: Tensor, rope_table: Callable[[int], Tensor],
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """(hidden states of every depth, ready for the head; sum of the balance terms) from h^0 [B, T, D]."""
    h, depths = hidden_BTD, []
    balance = torch.zeros((), dtype=torch.float32, device=h.device)
    for k, module in enumerate(modules, start=1):
        if k >= tokens_BT.shape[1]:  # no position has a token k ahead
            depths.append(h[:, :0])
            continue
        h, embedded, own = mtp_inputs(k, h, tokens_BT, segments, embedding_VD)
        h, term = module(h, embedded, rope_table(h.shape[1]), own)
        balance = balance + term
        depths.append(module.norm(h))
    return depths, balance


def mtp_inputs(
    k: int, h_BTD: Tensor, tokens_BT: Tensor, segments: Segments, embedding_VD: Tensor
) -> tuple[Tensor, Tensor, Segments]:
    """Inputs of depth k at the positions that have them all: h^{k-1}, the embeddings of the tokens k positions later,
    and the segments."""
    T = tokens_BT.shape[1] - k
    embedded = F.embedding(tokens_BT[:, k:], embedding_VD)
    return h_BTD[:, :T], embedded, first_tokens(segments, T)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module, frozen parts included, returns to its previous mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Scorer(Transformer):
    """A reward model's network: the same body with a scalar head (R1-Nature Methods).

    `scorer(tokens_BT)` gives the score of every prefix, [B, T] float32; the score of a text is that of its last token.
    On disk it is transformers' `DeepseekV3ForSequenceClassification` with one label, `score.weight` and no MTP layers.
    """

    readout = "score"

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg.model_copy(update={"n_mtp": 0}))
        del self.head
        self.score = Linear(cfg.dim, 1)

    @classmethod
    @torch.no_grad()
    def of(cls, model: Transformer, seed: int) -> Scorer:
        """A copy of a language model's body with a new head."""
        device, dtype = model.embed.weight.device, model.embed.weight.dtype
        scorer = cls(model.cfg).to_compute(dtype).to(device)
        body = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(("head.", "mtp."))}
        missing = scorer.load_state_dict(body, strict=False)
        assert missing == (["score.weight"], []), missing
        scorer.score.weight.copy_(cls.new_head(model.cfg, seed))
        return scorer

    @staticmethod
    def new_head(cfg: ModelConfig, seed: int) -> Tensor:
        """Initial values of `score.weight`, [1, D] float32 on the CPU."""
        fresh = torch.empty(1, cfg.dim, dtype=torch.float32)
        return fresh.normal_(0.0, cfg.init_std, generator=torch.Generator().manual_seed(seed))

    def forward(self, tokens_BT: Tensor, segments: Segments = None) -> Tensor:
        return self.scores(self.norm(self.hidden(tokens_BT, segments)))

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores [...] of hidden states [..., D] after the final norm, in float32, as two answers differ by little."""
        return scores(hidden, self.score.weight)


def scores(hidden: Tensor, weight_1D: Tensor) -> Tensor:
    """`Scorer.scores`, given the weight of the head."""
    return hidden.float() @ weight_1D.float().squeeze(0)
