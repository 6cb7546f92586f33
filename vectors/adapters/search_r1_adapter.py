"""Search-R1: the advantages that `RayPPOTrainer.fit` hands to its actor, from a checkout (SEARCH_R1=folder).

The loop is the project's own; its workers, its rollout and its reward are small stand-ins that answer at once.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import torch
from table_model import absent, checkout

checkout("SEARCH_R1")
absent("vllm", "flash_attn", "megatron", "wandb", "codetiming")

import verl.trainer.ppo.ray_trainer as ray_trainer  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from verl import DataProto  # noqa: E402


class _Loop:
    """Stands for the rollout with searches: every completion is one token."""

    def __init__(self, **_):
        self.timing_raw = {}

    def run_llm_loop(self, gen_batch, initial_input_ids):
        rows = len(gen_batch.batch)
        ids = torch.ones(rows, 2, dtype=torch.int64)
        return DataProto.from_dict(
            {
                "prompts": ids[:, :1],
                "responses": ids[:, 1:],
                "input_ids": ids,
                "attention_mask": ids,
                "position_ids": ids,
            }
        )


class _Timer:
    def __init__(self, *_, **__):
        self.last = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class _Done(Exception):
    pass


def group_advantages(rewards, groups, std, eps):
    sizes = np.bincount(groups)
    size = int(sizes.max())
    if std != "sample" or (sizes[sizes > 0] != size).any() or size == 1:
        raise NotImplementedError("n_agent completions of every prompt, standard deviation of a sample")
    order = np.argsort(groups, kind="stable")  # a prompt and its repetitions follow each other
    trainer, seen = object.__new__(ray_trainer.RayPPOTrainer), {}

    def update_actor(batch):
        seen["advantages"] = batch.batch["advantages"][:, 0]
        raise _Done

    trainer.config = OmegaConf.create({
        "do_search": True, "max_turns": 1, "retriever": {"url": "", "topk": 1},
        "data": {"max_start_length": 1, "max_prompt_length": 1, "max_response_length": 1, "max_obs_length": 1},
        "trainer": {"n_gpus_per_node": 1, "total_epochs": 1, "critic_warmup": 0, "test_freq": 0, "save_freq": 0},
        "algorithm": {"no_think_rl": False, "adv_estimator": "grpo", "gamma": 1.0, "lam": 1.0, "kl_penalty": "kl"},
        "actor_rollout_ref": {
            "rollout": {"n": 1, "n_agent": size}, "actor": {"use_kl_loss": True, "state_masking": False},
        },
    })  # fmt: skip
    trainer.actor_rollout_wg = SimpleNamespace(
        world_size=1, update_actor=update_actor,
        compute_log_prob=lambda batch: DataProto.from_dict({"old_log_probs": torch.zeros(len(batch.batch), 1)}),
    )  # fmt: skip
    trainer.tokenizer = trainer.val_reward_fn = trainer.logger = None
    trainer.use_reference_policy = trainer.use_critic = trainer.use_rm = False
    trainer._balance_batch = lambda batch, metrics: None
    trainer.reward_fn = lambda batch: torch.tensor(rewards[order], dtype=torch.float32)[:, None]
    prompts = torch.ones(int((sizes > 0).sum()), 1, dtype=torch.int64)
    trainer.train_dataloader = [{
        "input_ids": prompts, "attention_mask": prompts, "position_ids": prompts,
        "index": np.array([f"prompt {i}" for i in range(len(prompts))], dtype=object),
    }]  # fmt: skip
    ray_trainer.LLMGenerationManager, ray_trainer.Timer = _Loop, _Timer
    with contextlib.suppress(_Done):
        trainer.fit()
    advantages = np.empty(len(rewards))
    advantages[order] = seen["advantages"]
    return {"advantages": advantages}
