"""Does the test that the conformance table names for an item notice when its file is broken?

    python bench/mutations.py               every item that the results do not hold yet, about a minute each
    python bench/mutations.py clip rope     those whose names contain one of the words, again

Each mutation replaces one piece of text in the item's file in a copy of the tree and runs the item's test file there
until its first failure. A test that stays green is a finding: it needs strengthening, or the table names a wrong one.
Results go to bench/results/mutations.json after every item, so an interrupted run resumes where it stopped.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bessemer.addons.plan.conformance import ITEMS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "mutations.json"
LIMIT = 900
"""Seconds for one test file."""

MUTATIONS: dict[str, tuple[str, str]] = {
    "Multi-head latent attention": ("return self.kv_norm(c), k_rope", "return c, k_rope"),
    "Query compression": ("self.wq_b(self.q_norm(self.wq_a(x_BTD)))", "self.wq_b(self.wq_a(x_BTD))"),
    "Interleaved RoPE, YaRN off in the short stage": (
        "x.float().unflatten(-1, (-1, 2)).unbind(-1)", "x.float().unflatten(-1, (2, -1)).unbind(-2)"  # halves
    ),
    "DeepSeekMoE": (  # a token's first expert alone
        "sent.x_ND, sent.routing.expert_NK, sent.routing.weight_NK,",
        "sent.x_ND, sent.routing.expert_NK[:, :1].contiguous(), sent.routing.weight_NK[:, :1].contiguous(),",
    ),
    "Sigmoid gate, normalised, scaled": (
        "self.cfg, counting", 'self.cfg.model_copy(update={"norm_topk_prob": False}), counting'
    ),
    "Group-limited routing": (
        "self.cfg, counting", 'self.cfg.model_copy(update={"n_limited_groups": self.cfg.n_expert_groups}), counting'
    ),
    "Leading dense layers": ("moe.FFN(cfg.dim, cfg.inter_dim)", "moe.FFN(cfg.dim, cfg.moe_inter_dim)"),
    "Bias balancing, MTP layers included": ("gate.bias_E += gamma", "gate.bias_E -= gamma"),
    "Sequence-wise balance loss": ("(batch.loss_BT.sum() / batch.tokens_BT.shape[0])", "batch.loss_BT.sum()"),
    "No token dropping": (
        "return Unsent(x_ND, routing)",  # only half of the tokens reach their experts
        "return Unsent(x_ND, routing._replace(weight_NK=routing.weight_NK * (torch.arange(len(x_ND)) % 2)[:, None]))",
    ),
    "Multi-token prediction": (
        "(self.enorm(embedded_BTD), self.hnorm(h_BTD))", "(self.hnorm(h_BTD), self.enorm(embedded_BTD))"
    ),
    "AdamW, FP32 masters": ("if norm / divisor > clip:", "if norm / divisor > 2 * clip:"),
    "Learning rate over consumed tokens": ("share = (1 - math.cos(math.pi * share)) / 2", "pass"),
    "Batch size over consumed tokens": ("self.plan.batch_rows(tokens)", "self.plan.batch_rows(0)"),
    "Initialisation": ("normal_(0.0, self.cfg.init_std", "normal_(0.0, 2 * self.cfg.init_std"),
    "Packing without cross-document mask": ("fitting := rooms >> length", "fitting := 0"),  # every piece its own row
    "Fill-in-the-middle": (
        "(text[:first], text[second:], text[first:second])", "(text[:first], text[first:second], text[second:])"
    ),
    "Random split of punctuation + line break": ("rng.random() < self._split_rate", "rng.random() < 0"),
    "Byte-level BPE with V3's pre-split": (r'r"\p{N}{1,3}"', r'r"\p{N}+"'),
    "FP8 training": ('activation: Group = "tile"', 'activation: Group = "tensor"'),
    "Activations stored in FP8 and E5M6; norms and up-projections recomputed": (
        "pack_e5m6(out, o.scale_MJ)", "pack_e5m6(o.dequantise().to(out.dtype), o.scale_MJ)"  # FP8 instead
    ),
    "Moments of the optimizer in BF16": (
        "torch.zeros(length, dtype=moments,", "torch.zeros(length, dtype=torch.float32,"
    ),
    "Moving average of the weights": ("lerp_(master, 1 - self.decay)", "lerp_(master, self.decay)"),
    "DualPipe": ("self.sum_with_others(name, gradients[name])", "pass"),  # the two copies of a stage part
    "Expert parallelism, a token to a node once": (  # to all
        "at_PTK.any(2)", "at_PTK.any(2).any(0).expand(hop.places, -1)"
    ),
    "ZeRO-1": ("sum() / self.holders", "sum()"),
    "Long-context extension in phases": ('"original_seq_len": original,', '"original_seq_len": config.length,'),
    "YaRN on the rotary key, the same in every phase": (
        "theta * (1 - ramp) + theta / cfg.rope_factor * ramp", "theta / cfg.rope_factor"
    ),
    "Needle in a haystack over lengths and depths": ("_plant(pieces, facts, depth,", "_plant(pieces, facts, 0.5,"),
    "R1-Zero: RL from the base, no SFT": (
        "for number in range(first, settings.rollouts):", "for number in range(first, settings.rollouts - 1):"
    ),
    "Prompt template": ('if style == "r1-zero" and not system', 'if style == "zero" and not system'),
    "GRPO groups": ("(sound * reward_PG).sum(1, keepdim=True) / count", "(sound * reward_PG).sum() / sound.sum()"),
    "Advantage: reward minus the group's mean, over its standard deviation": ("(std + EPSILON)", "(std + 0.1)"),
    "Loss of a token": ('1.0 / max(1, len(own_N)) if self.normalise == "sequence" else 1.0', "1.0"),
    "Clip": ("advantage_N, clip_low, clip_high)", "advantage_N, clip_high, clip_low)"),
    "KL to the reference (k3, in the loss)": ("return gap.exp() - gap - 1.0", "return -gap"),
    "Mini-batches per rollout": ("for i in order[start : start + size]", "for i in order[:size]"),
    "On policy, every sample used": (
        "return Rollout(groups, n_problems, cap, step)",
        "return Rollout(groups[:-1], asked, cap, step)",
    ),
    "Learning rate of RL": ("learning_rate(self.tokens, self.step, ", "learning_rate(self.tokens, 0, "),
    "Sampling temperature of RL": ("self.temperature, entropy=True", "1.0, entropy=True"),
    "Sampling temperature with preference rewards": ("target, temperature, kept", "target, 1.0, kept"),
    "Rewards": ("row.reward = sum(row.terms)", "row.reward = row.terms[0]"),
    "SFT: answers only, samples packed with masks": ("(packed & 1).float()", "torch.ones_like(packed).float()"),
    "Length cap raised mid-run": ("max_new_tokens(self.trainer.step)", "max_new_tokens(0)"),
    "Cold start: readable R1-Zero answers in one form": (
        'config.answers == "right" and not row.verdict.correct', "False"
    ),
    "Language consistency reward": ('(latin if language == "en" else han) /', "max(latin, han) /"),
    "Rejection sampling: correct and readable answers": (
        "return None if reading.readable else reading.reason", "return None"
    ),
    "Reward models: helpful by pairs, harmless by labels": (
        'trainer.extras["bad"], trainer.extras["good"]', 'trainer.extras["good"], trainer.extras["bad"]'
    ),
    "Preference rewards only at the end": ("number >= settings.general.start", "number >= 0"),
    "Distillation: SFT of a smaller model on checked samples": ("tokens=epochs * rows.n_rows", "tokens=rows.n_rows"),
    "Evaluation by sampling": ("return 1.0 - comb(n - correct, k) / comb(n, k)", "return correct / n"),
}  # fmt: skip


def main(words: list[str]) -> None:
    items = {item.item: item for item in ITEMS}
    if wrong := misplaced():
        raise SystemExit("\n".join(wrong))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, item in items.items():
        case = {"file": f"src/bessemer/{item.code}", "test": f"tests/{item.test}", "text": [*MUTATIONS[name]]}
        done = {key: results.get(name, {}).get(key) for key in case} == case and results[name]["red"]
        if any(word in name.lower() for word in words) if words else not done:
            results[name] = case | run(**case)
            ordered = {name: results[name] for name in items if name in results}
            RESULTS.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
            print(f"{'red' if results[name]['red'] else 'GREEN'}  {name}: {results[name]['said']}", flush=True)
    green = [name for name in items if not results.get(name, {}).get("red")]
    print(f"{len(items) - len(green)} of {len(items)} tests notice" + "".join(f"\n  not: {name}" for name in green))


def misplaced() -> list[str]:
    """What keeps the mutations from being run: an item without one, or a text that its file does not hold exactly
    once. The tests ask this, so a change of a file that a mutation breaks is noticed at once."""
    code = {item.item: item.code for item in ITEMS}
    wrong = [f"{name}: in the table or the mutations, but not in both" for name in code.keys() ^ MUTATIONS.keys()]
    for name in code.keys() & MUTATIONS.keys():
        times = (ROOT / "src" / "bessemer" / code[name]).read_text().count(text := MUTATIONS[name][0])
        if times != 1:
            wrong.append(f"{name}: {code[name]} holds {text!r} {times} times; change the mutation")
    return sorted(wrong)


def run(file: str, test: str, text: list[str]) -> dict[str, object]:
    """Whether a test file fails with one piece of text replaced, and the first failure."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(lambda name: (ROOT / name).is_file(), tracked.splitlines()):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
        (copy / file).write_text((copy / file).read_text().replace(*text))
        paths = os.pathsep.join(str(copy / name) for name in ("src", "tests/shared"))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
        try:
            ended = subprocess.run(
                command, cwd=copy, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
                capture_output=True, text=True, timeout=LIMIT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"red": False, "said": f"no end within {LIMIT} s"}
        failed = re.search(r"^(?:FAILED|ERROR) [^:]*::(\S+)", ended.stdout, re.MULTILINE)
        if ended.returncode > 1 or (ended.returncode and not failed):
            return {"red": False, "said": f"the tests do not run: {ended.stdout[-300:]}"}
        return {"red": ended.returncode == 1, "said": failed[1] if failed else "all tests pass"}


if __name__ == "__main__":
    main([word.lower() for word in sys.argv[1:]])
