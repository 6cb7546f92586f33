"""What a request may ask for beside its sampling parameters: penalties and biases, a grammar, a budget for thoughts.

A row that none of these decides about at this token is sampled as if they were not there.

Shapes: C bound rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bessemer.addons.serve.grammar import Grammars, GrammarState
from bessemer.addons.serve.penalties import Penalties, PenaltyParams
from bessemer.addons.serve.reasoning_parser import think_ids
from bessemer.addons.serve.requests import Control, Controls, ServedRequest, ServedSequence
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.sequence import FinishReason
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel


@dataclass(frozen=True)
class TokenRules:
    """`Request.control`."""

    penalties: PenaltyParams = field(default_factory=PenaltyParams)
    thinking_budget: int | None = None
    """After this many tokens inside <think>, the next token is forced to be </think>."""
    grammar: str = ""
    """The grammar that the answer must follow (`grammar.json_grammar`); empty: none."""
    grammar_waits: bool = False
    """The prompt ends inside a thought, and the grammar applies only after it."""
    ends: tuple[int, ...] = ()
    """Tokens with which the model ends an answer: not allowed inside that thought if the grammar asks for content."""

    def or_none(self) -> TokenRules | None:
        """None if there is no rule: the sequence can then be drafted for."""
        return None if self == TokenRules() else self

    def controls(self, tokenizer: Tokenizer, model: LanguageModel) -> Controls:
        return TokenControls(tokenizer, model)


class TokenControl:
    """The rules of one sequence, and how far it has got in them."""

    def __init__(self, rules: TokenRules, grammar: GrammarState | None, think: tuple[int | None, int | None]):
        self.rules, self.grammar, self._think = rules, grammar, think
        self._most = 0
        """Tokens that the answer may have."""
        self._n_thinking: int | None = None
        """Tokens of the current thought; None outside a thought, and without a budget."""

    @property
    def must_end_thinking(self) -> bool:
        """Whether the thought has used up its budget: the next token is then </think>."""
        budget = self.rules.thinking_budget
        return budget is not None and self._n_thinking is not None and self._n_thinking >= budget

    @property
    def free(self) -> bool:
        """Whether the next token is drawn from the logits as they are."""
        bound = self.grammar is not None and (not self.grammar.waits or self.grammar.needs_text)
        return not (bound or self.must_end_thinking or self.rules.penalties.any)

    def start(self, sequence: ServedSequence) -> None:
        """Finds out whether the sequence is inside a thought."""
        self._most = sequence.request.max_new_tokens
        if self.rules.thinking_budget is None or self._think[1] is None:
            return
        self._n_thinking = None
        self._count_thinking(sequence.request.prompt)
        self._n_thinking = None if self._n_thinking is None else 0
        self._count_thinking(sequence.tokens)

    def append(self, token: int, remaining: int) -> tuple[FinishReason, str] | None:
        if self.rules.thinking_budget is not None:
            self._count_thinking((token,))
        grammar = self.grammar
        if grammar is None:
            return None
        grammar.append(token)
        grammar.few(remaining, self._most)
        if grammar.error:
            return "error", f"the grammar of this answer failed: {grammar.error}"
        return ("length" if grammar.cut else "stop", "") if grammar.is_complete else None

    def allowed(self, vocab: int) -> Tensor | None:
        """The tokens that may come next, bool [vocab]; None for all."""
        if self.must_end_thinking:
            allowed_V = torch.zeros(vocab, dtype=torch.bool)
            allowed_V[self._think[1]] = True
            return allowed_V
        if self.grammar is None or self.free:
            return None
        if not self.grammar.waits:
            return self.grammar.allowed()
        allowed_V = torch.ones(vocab, dtype=torch.bool)
        allowed_V[list(self.rules.ends)] = not self.grammar.needs_text
        return allowed_V

    def _count_thinking(self, ids: Iterable[int]) -> None:
        start, end = self._think
        for token in ids:
            if token == start:
                self._n_thinking = 0
            elif token == end:
                self._n_thinking = None
            elif self._n_thinking is not None:
                self._n_thinking += 1


class TokenControls(Controls):
    """The rules of the live sequences."""

    def __init__(self, tokenizer: Tokenizer, model: LanguageModel):
        self._width = model.cfg.vocab_size
        self._penalties = Penalties(self._width, model.embed.weight.device)
        self._grammars, self._think = Grammars(tokenizer), think_ids(tokenizer)
        self._live: list[tuple[int, TokenControl]] = []
        """Rows with rules, those with penalties first."""

    def of(self, request: ServedRequest) -> Control | None:
        rules = request.control
        if not isinstance(rules, TokenRules):
            return None
        if (
            bad := next((token for token, _ in rules.penalties.bias if not 0 <= token < self._width), None)
        ) is not None:
            raise UserError(f"bias: {bad} is no token id below {self._width}")
        grammar = self._grammars.start(rules.grammar, rules.grammar_waits) if rules.grammar else None
        return TokenControl(rules, grammar, self._think)

    def follow(self, live: list[ServedSequence]) -> None:
        controls = {
            id(sequence): (b, sequence.control)
            for b, sequence in enumerate(live)
            if isinstance(sequence.control, TokenControl)
        }
        self._penalties.follow(
            [(sequence, controls[id(sequence)][1].rules.penalties) for sequence in live if id(sequence) in controls]
        )
        self._live = [controls.pop(id(sequence)) for sequence in self._penalties.sequences] + list(controls.values())

    def bound(self) -> list[int]:
        return [b for b, control in self._live if not control.free]

    def change(self, sequences: list[ServedSequence], logits_BV: Tensor, vocab: int) -> None:
        self._penalties.apply(logits_BV)
        controls = [sequence.control for sequence in sequences]
        masks = [control.allowed(vocab) if isinstance(control, TokenControl) else None for control in controls]
        if all(mask is None for mask in masks):
            return
        every_V = torch.ones(vocab, dtype=torch.bool)
        allowed_BV = torch.stack([every_V if mask is None else mask for mask in masks]).to(logits_BV.device)
        logits_BV[:, :vocab].masked_fill_(~allowed_BV, float("-inf"))
