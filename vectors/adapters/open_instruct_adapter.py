"""open-instruct: `PolicyTrainerRayProcess.train` of grpo_fast, from a checkout (OPEN_INSTRUCT=folder), on one process.

Its engines (DeepSpeed, vLLM) stay empty: the policy is a table of log-probabilities, and `model.step` does nothing, so
that the gradients of all micro-batches remain to be read.
"""

from types import SimpleNamespace

import torch
import torch.distributed
from table_model import absent, checkout

checkout("OPEN_INSTRUCT")
absent(
    "deepspeed", "vllm", "wandb", "beaker", "hf_transfer", "litellm", "fastapi", "uvicorn", "olmo_core", "langdetect",
    "immutabledict", "nltk", "debugpy", "bitsandbytes", "flash_attn", "tensorboard", "google.cloud", "mason",
    "dateparser", "tenacity", "jinja2_time", "matplotlib", "syllapy", "emoji", "antlr4",
)  # fmt: skip

from open_instruct import grpo_fast  # noqa: E402

Trainer = grpo_fast.PolicyTrainerRayProcess.__ray_metadata__.modified_class


class _Metrics(dict):
    def get_metrics_list(self):
        return self


def _train(logprobs, mask, micro_batch, *, ref=None, **settings):
    """d loss / d log-probabilities of one step, on policy, advantage -1 of every row (0 with a reference)."""
    table = torch.nn.Parameter(torch.tensor(logprobs))
    rows = [torch.tensor((micro_batch == m).nonzero()[0]) for m in sorted(set(micro_batch.tolist()))]
    trainer = object.__new__(Trainer)
    trainer.args = SimpleNamespace(
        num_epochs=1, mask_tool_use=False, tool_use=False, temperature=1.0, record_entropy=False, clip_lower=0.2,
        use_vllm_logprobs=False, clip_higher=0.2, truncated_importance_sampling_ratio_cap=0.0,
        load_ref_policy=ref is not None, beta=0.0, kl_estimator=2, masked_mean_axis=None, masked_mean_denominator=None,
        loss_denominator="token",
    )  # fmt: skip
    vars(trainer.args).update(settings)
    trainer.rank, trainer.device, trainer.local_metrics = 0, torch.device("cpu"), _Metrics()
    trainer.scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
    trainer.model = SimpleNamespace(backward=lambda loss: loss.backward(), step=lambda: None, table=table)
    trainer.ref_policy = SimpleNamespace(table=None if ref is None else torch.tensor(ref))
    trainer.forward = lambda model, ids, *_, **__: (model.table[ids[:, 0]], None)

    def first(values):  # a column for the prompt
        return [torch.cat([torch.zeros_like(values[:, :1]), values], 1)[part] for part in rows]

    ids = torch.arange(len(table))[:, None].expand(-1, table.shape[1] + 1)
    keep, ones = torch.tensor(mask), torch.ones(table.shape, dtype=torch.float64)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    metrics = trainer.train(
        [ids[part] for part in rows], first(ones.bool()), first(ones.bool()), first(ones.long()),
        first((-1.0 if ref is None else 0.0) * ones), first(keep), first(table.detach().clone()), 0, 1,
    )  # fmt: skip
    return table.grad, metrics


def loss_weights(mask, micro_batch, level, length):
    sizes = {int((micro_batch == m).sum()) for m in set(micro_batch.tolist())}
    if any(mask[micro_batch == m].sum() < 2 for m in set(micro_batch.tolist())):
        raise NotImplementedError("its metrics need two trained tokens in every micro-batch")
    if level == "sequence":
        raise NotImplementedError("grpo_fast divides by tokens or by a constant")
    if len(sizes) > 1 and level == "constant":
        raise NotImplementedError("its micro-batches are of one size")
    constant = {"masked_mean_denominator": float(sizes.pop() * length), "loss_denominator": float(len(mask) * length)}
    gradient, _ = _train(
        -torch.ones(mask.shape).double().numpy(), mask, micro_batch, **(constant if level == "constant" else {})
    )
    return {"weights": gradient}


def kl_loss(logprobs, ref_logprobs, mask, beta, form, level):
    if level == "sequence":
        raise NotImplementedError("grpo_fast divides by tokens or by a constant")
    estimator = {"k1": 0, "k2": 1, "k3": 2}[form]
    one = torch.zeros(len(mask), dtype=torch.int64).numpy()
    gradient, metrics = _train(logprobs, mask, one, ref=ref_logprobs, beta=beta, kl_estimator=estimator)
    return {"loss": float(metrics["loss/total_avg"]), "gradient": gradient}
