"""prime-rl: the advantages that `orchestrate` writes for its trainer, from a checkout (PRIME_RL=folder).

The loop is the project's own; server, environment and monitor are stand-ins that answer at once.
"""

import asyncio
import tempfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
from datasets import Dataset
from table_model import absent, checkout

folder = checkout("PRIME_RL")
absent("vllm", "verifiers", "lovely_tensors", "wandb", "openai", "genesys", "pynvml", "prime_rl.orchestrator.genesys")

import sys  # noqa: E402

sys.path.insert(0, str(folder / "src"))

import prime_rl.orchestrator.orchestrator as loop  # noqa: E402


async def _nothing(*_, **__):
    return None


class _Environment:
    """Problem p is the text "p"; its j-th completion earns the j-th reward of its group."""

    def __init__(self, rewards):
        self.rewards, self.rows = rewards, []

    def get_dataset(self, seed):
        return Dataset.from_list([{"prompt": str(p), "task": "", "answer": ""} for p in range(len(self.rewards))])

    async def a_generate(self, inputs, **_):
        count = Counter()
        for prompt in inputs["prompt"]:
            self.rows.append((int(prompt), count[prompt]))
            count[prompt] += 1
        blank = [""] * len(self.rows)
        rewards = [float(self.rewards[p][j]) for p, j in self.rows]
        return {"prompt": blank, "completion": blank, "state": blank, "reward": rewards}

    def process_env_results_vllm(self, **_):
        ids = [[0]] * len(self.rows)
        names = ("prompt_ids", "completion_ids", "completion_logprobs", "prompt_mask", "completion_mask")
        return dict.fromkeys(names, ids)


def group_advantages(rewards, groups, std, eps):
    sizes = np.bincount(groups)
    sizes = sizes[sizes > 0]
    if std != OFFERED or (sizes != sizes[0]).any() or len(sizes) < 2:
        raise NotImplementedError(f"as many completions of every prompt; std {OFFERED!r}")
    members = [np.flatnonzero(groups == g) for g in sorted(set(groups.tolist()))]
    environment, seen = _Environment([rewards[rows] for rows in members]), {}

    def prepare_batch(*arguments, **_):
        seen["advantages"] = arguments[5]
        return []

    quiet = SimpleNamespace(log=lambda *_: None, wandb=None)
    loop.setup_client = loop.setup_logger = lambda *_: _Quiet()
    loop.check_health = loop.check_has_model = loop.reset_weights = _nothing
    loop.AutoTokenizer = SimpleNamespace(from_pretrained=lambda _: None)
    loop.setup_monitor = lambda *_: quiet
    loop.load_environment = lambda *_: environment
    loop.prepare_batch = prepare_batch
    loop.lt = SimpleNamespace(lovely=lambda _: "")
    with tempfile.TemporaryDirectory() as rollouts:
        config = SimpleNamespace(
            log=None, bench=False, max_steps=1, async_level=1, client=SimpleNamespace(host="", port=0),
            model=SimpleNamespace(name=""), monitor=None, ckpt=None, eval=None, seed=0, seq_len=8, micro_batch_size=1,
            environment=SimpleNamespace(id="", args={}), batch_size=len(rewards), rollouts_per_prompt=int(sizes[0]),
            sampling=_Sampling(), mask_env_responses=False, zero_truncated_completions=False, num_train_workers=1,
            mask_truncated_completions=False, rollout_path=rollouts, collate_mode="padding", weights_path=rollouts,
        )  # fmt: skip
        asyncio.run(loop.orchestrate.__wrapped__(config))
    advantages = np.empty(len(rewards))
    for (p, j), advantage in zip(environment.rows, seen["advantages"], strict=True):
        advantages[members[p][j]] = advantage
    return {"advantages": advantages}


class _Quiet:
    def __getattr__(self, _):
        return lambda *_, **__: None


class _Sampling(dict):
    temperature = 1.0


OFFERED = "none"
