"""transformers: the gate, YaRN, rotary vectors and MLA of its DeepSeek-V3, in the network's own classes."""

import torch
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

torch.set_default_dtype(torch.float64)


def _config(**settings):
    return DeepseekV3Config(**{"attn_implementation": "eager", "hidden_size": 8, "num_attention_heads": 1, **settings})


def gate(logits, bias, groups, kept_groups, top_k, score, group_score, normalise, scale):
    if score != "sigmoid" or group_score != "top2":
        raise NotImplementedError("V3's router: sigmoid, the sum of the two largest of a group")
    experts = logits.shape[1]
    router = v3.DeepseekV3TopkRouter(_config(
        hidden_size=experts, n_routed_experts=experts, num_experts_per_tok=top_k, n_group=groups,
        topk_group=kept_groups, norm_topk_prob=normalise, routed_scaling_factor=scale,
    ))  # fmt: skip
    router.weight.data.copy_(torch.eye(experts))
    router.e_score_correction_bias.copy_(torch.tensor(bias))
    _, weights, chosen = router(torch.tensor(logits))
    out = torch.zeros(logits.shape, dtype=weights.dtype).scatter(1, chosen, weights)
    return {"chosen": torch.zeros(logits.shape, dtype=torch.bool).scatter(1, chosen, True), "weights": out}


def yarn(dim, base, factor, original_length, beta_fast, beta_slow, mscale, mscale_all_dim, head_dim):
    config = _config(
        qk_rope_head_dim=dim, qk_nope_head_dim=head_dim - dim, v_head_dim=dim, q_lora_rank=None, kv_lora_rank=4,
        max_position_embeddings=int(original_length * factor), rope_parameters={
            "rope_type": "yarn", "rope_theta": base, "factor": factor, "beta_fast": beta_fast,
            "original_max_position_embeddings": original_length, "beta_slow": beta_slow, "mscale": mscale,
            "mscale_all_dim": mscale_all_dim,
        },
    )  # fmt: skip
    inv_freq, scale = ROPE_INIT_FUNCTIONS["yarn"](config)
    return {"inv_freq": inv_freq, "table_scale": scale, "softmax_scale": v3.DeepseekV3Attention(config, 0).scaling}


def _tables(positions, inv_freq):
    angles = torch.tensor(positions)[:, None] * torch.tensor(inv_freq)
    angles = torch.cat([angles, angles], 1)[None]
    return angles.cos(), angles.sin()


def rope_scores(q, k, positions, inv_freq, pairs):
    rotate = {"interleaved": v3.apply_rotary_pos_emb_interleave, "halves": v3.apply_rotary_pos_emb}[pairs]
    q, k = rotate(torch.tensor(q)[None, None], torch.tensor(k)[None, None], *_tables(positions, inv_freq))
    return {"scores": q[0, 0] @ k[0, 0].T}


def mla(x, segments, q_down, q_norm, q_up, kv_down, kv_norm, kv_up, out, heads, nope, rope, value, inv_freq,
        softmax_scale, eps, form):  # fmt: skip
    if form == "absorbed":
        raise NotImplementedError("keys and values are expanded")
    tokens, hidden = x.shape
    layer = v3.DeepseekV3Attention(_config(
        hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=heads, q_lora_rank=len(q_down) or None,
        kv_lora_rank=len(kv_down) - rope, qk_rope_head_dim=rope, qk_nope_head_dim=nope, v_head_dim=value,
        rope_interleave=True,
    ), 0).eval()  # fmt: skip
    names = {"kv_a_proj_with_mqa": kv_down, "kv_a_layernorm": kv_norm, "kv_b_proj": kv_up, "o_proj": out}
    names |= {"q_a_proj": q_down, "q_a_layernorm": q_norm, "q_b_proj": q_up} if len(q_down) else {"q_proj": q_up}
    for name, weight in names.items():
        getattr(layer, name).weight.data = torch.tensor(weight)
    for norm in (layer.q_a_layernorm, layer.kv_a_layernorm):
        if norm is not None:
            norm.variance_epsilon = eps
    layer.scaling = softmax_scale
    same = torch.tensor(segments)[:, None] == torch.tensor(segments)
    blocked = torch.where(same & torch.ones(tokens, tokens).tril().bool(), 0.0, float("-inf"))[None, None]
    positions = [int((segments[:i] == segments[i]).sum()) for i in range(tokens)]
    with torch.no_grad():
        output = layer(torch.tensor(x)[None], _tables(positions, inv_freq), blocked)[0][0]
        latent = layer.kv_a_layernorm(layer.kv_a_proj_with_mqa(torch.tensor(x))[:, : len(kv_down) - rope])
    return {"output": output, "latent": latent}
