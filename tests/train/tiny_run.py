"""A small real run for the tests of this folder: the real network, rows made by arithmetic, about 10 ms per step.

As a script (`python tiny_run.py STATE_DIR STEPS`) it trains and can be killed.
"""

import sys

import torch
from train_config import train_config

from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points
from bessemer.data.batch import Batch
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer
from bessemer.train.objective import next_token
from bessemer.train.plan import TrainingPlan
from bessemer.train.trainer import Trainer

torch.set_num_threads(1)
T, V = 16, 64
ROWS = 8


def model(seed: int = 0, **changes) -> Transformer:
    shape = dict(
        vocab_size=V, dim=32, n_layers=2, n_dense_layers=1, inter_dim=48, moe_inter_dim=16, n_heads=2, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8,
        n_activated_experts=2, n_expert_groups=4, n_limited_groups=2, route_scale=2.5, n_mtp=1, max_seq_len=T,
        init_std=0.05,
    )  # fmt: skip
    return Transformer(ModelConfig(**(shape | changes))).initialise(seed)


def batches(first_row: int, n_rows: int) -> Batch:
    """Row r counts up from its own start in steps of 1 + r mod 3: learnable, and a function of r alone."""
    rows = torch.arange(first_row, first_row + n_rows)
    tokens = (rows[:, None] * 7 + torch.arange(T)[None] * (1 + rows[:, None] % 3)) % V
    loss = torch.ones(n_rows, T)
    loss[:, 0] = 0
    return Batch(tokens, loss)


def config(steps: int, **changes) -> tuple[PretrainConfig, TrainingPlan]:
    per_step = ROWS * T
    values = dict(
        tokens=steps * per_step, lr=Points([[0, 1e-3], [20 * per_step, 3e-3]]), gamma=0.01,
        batch_rows=ROWS, micro_rows=4,
        terms={"mtp_lambda": Points([[0, 0.3], [10 * per_step, 0.1]]), "balance_alpha": 1e-3},
    )  # fmt: skip
    return train_config(**(values | changes))


def trainer(network=None, steps: int = 10, state_dir=None, data=batches, **changes) -> Trainer:
    keywords = {
        key: changes.pop(key)
        for key in ("log", "stop", "on_step", "model_config", "warn", "generators")
        if key in changes
    }
    return Trainer(network or model(), next_token, data, *config(steps, **changes), state_dir, **keywords)


if __name__ == "__main__":
    run = trainer(steps=int(sys.argv[2]), state_dir=sys.argv[1], save_steps=3)
    run.on_step = [lambda t: print(t.step, flush=True)]
    run.run()
