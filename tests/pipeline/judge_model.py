"""A small model trained to give one answer to every question: as a judge it finds every answer correct. As a rater by
a rubric it gives 3 points or 8."""

from pathlib import Path

import torch

from bessemer.addons.r1.judge import GRADE, marked
from bessemer.addons.r1.rubric import AS_LINE, HELPFUL, RATE
from bessemer.data.batch import Batch
from bessemer.data.chat import exchange, render_answers
from bessemer.data.tokenizer import Tokenizer
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train.objective import next_token

NUMBERS = 12
REPLY = "<think>\nYes.\n</think>\n\nVerdict: correct"
RATING = "<think>\nYes.\n</think>\n\nScore: {}"


def asked(number: int) -> tuple[str, str]:
    """(question, reference answer)."""
    return f"What is the name of number {number}?", f"It is called N{number}."


def write(folder: Path) -> Path:
    torch.set_num_threads(1)
    prompts, replies = [], []
    for number in range(NUMBERS):
        question, reference = asked(number)
        prompts += [
            question,
            marked(GRADE, question=question, reference=reference, answer="Verdict: correct"),
            marked(RATE + AS_LINE, question=question, rubric=HELPFUL, answer="Verdict: correct"),
        ]
        replies += [REPLY, REPLY, RATING.format(3 + 5 * (number % 2))]
    tokenizer = Tokenizer.train([*prompts, *[REPLY, RATING.format(38)] * 9], 540, chat_style="r1")
    tokenizer.save(folder / "tokenizer")
    shape = dict(
        vocab_size=tokenizer.vocab_size, dim=32, n_layers=2, inter_dim=64, moe_inter_dim=16, n_heads=2, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8, n_expert_groups=4,
        n_limited_groups=2, n_activated_experts=2, max_seq_len=512, init_std=0.08,
    )  # fmt: skip
    model = Transformer(preset("tiny", **shape)).initialise(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    texts = [render_answers(tokenizer, exchange(*pair)) for pair in zip(prompts, replies, strict=True)]
    width = max(len(ids) for ids, _ in texts)
    tokens = torch.full((len(texts), width), tokenizer.pad_id)
    loss = torch.zeros(len(texts), width)
    for row, (ids, answers) in enumerate(texts):
        tokens[row, : len(ids)], loss[row, : len(ids)] = torch.tensor(ids), torch.tensor(answers).float()
    for step in range(300):
        rows = torch.arange(step % 8, len(texts), 8)
        out = next_token(model, Batch(tokens[rows], loss[rows]), 0.1, 1e-4)
        value = out.total / out.tokens
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if value.item() < 0.02:
            break
    model.save(folder / "model", tokenizer_dir=folder / "tokenizer")
    return folder / "model"
