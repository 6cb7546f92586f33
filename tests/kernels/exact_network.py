"""A second `model.transformer` in float64, as the papers write it: no cache, no kernels, one text at a time."""

import torch

from bessemer.model.mla import LATENT_EPS, rope_table


def norm(x, module, eps):
    return module.weight.double() * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def linear(x, module):
    return x @ module.weight.double().T


def swiglu(x, w13, w2):
    gate, up = (x @ w13.double().T).chunk(2, -1)
    return (gate * gate.sigmoid() * up) @ w2.double().T


def rotated(x, turn):
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def attention(attn, u, cfg):
    T, H, N = len(u), cfg.n_heads, cfg.qk_nope_head_dim
    turn = torch.view_as_complex(rope_table(cfg, T).double())
    q = (
        linear(norm(linear(u, attn.wq_a), attn.q_norm, LATENT_EPS), attn.wq_b)
        if cfg.q_lora_rank
        else linear(u, attn.wq)
    )
    q = q.view(T, H, -1)
    c, k_rope = linear(u, attn.wkv_a).split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
    kv = linear(norm(c, attn.kv_norm, LATENT_EPS), attn.wkv_b).view(T, H, -1)
    q = torch.cat((q[..., :N], rotated(q[..., N:], turn[:, None])), -1)
    k = torch.cat((kv[..., :N], rotated(k_rope, turn)[:, None].expand(-1, H, -1)), -1)
    score = torch.einsum("thx,shx->hts", q, k) * cfg.softmax_scale
    score = score.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
    return linear(torch.einsum("hts,shv->thv", score.softmax(-1), kv[..., N:]).flatten(1), attn.wo)


def experts_of(gate, u, cfg):
    """(experts [T, K], gates [T, K])."""
    score = linear(u, gate)
    score = score.sigmoid() if cfg.score_func == "sigmoid" else score.softmax(-1)
    z = score if gate.bias_E is None else score + gate.bias_E
    if cfg.topk_method != "greedy" and cfg.n_expert_groups > 1:
        groups = z.unflatten(-1, (cfg.n_expert_groups, -1))
        best = groups.sort(-1, descending=True).values[..., : cfg.n_rated_experts].sum(-1)
        worst_kept = best.sort(-1, descending=True).values[:, cfg.n_limited_groups - 1, None]
        z = groups.masked_fill((best < worst_kept)[..., None], -torch.inf).flatten(1)
    chosen = z.sort(-1, descending=True).indices[:, : cfg.n_activated_experts]
    weight = score.gather(1, chosen)
    return chosen, cfg.route_scale * (weight / weight.sum(-1, keepdim=True) if cfg.norm_topk_prob else weight)


@torch.no_grad()
def forward(model, ids):
    """(logits [T, V], experts [T, L, K]) of one text."""
    cfg, routes = model.cfg, []
    x = model.embed.weight.double()[torch.tensor(ids)]
    for layer in model.layers:
        x = x + attention(layer.attn, norm(x, layer.attn_norm, cfg.norm_eps), cfg)
        u = norm(x, layer.ffn_norm, cfg.norm_eps)
        if layer.dense:
            x = x + swiglu(u, layer.ffn.w13.weight, layer.ffn.w2.weight)
            continue
        moe = layer.ffn
        chosen, weights = experts_of(moe.gate, u, cfg)
        routes.append(chosen)
        for e in range(cfg.n_routed_experts):
            token, choice = (chosen == e).nonzero(as_tuple=True)
            y = weights[token, choice, None] * swiglu(u[token], moe.experts.w13[e], moe.experts.w2[e])
            x = x.index_add(0, token, y)
        if moe.shared is not None:
            x = x + swiglu(u, moe.shared.w13.weight, moe.shared.w2.weight)
    return linear(norm(x, model.norm, cfg.norm_eps), model.head), torch.stack(routes, 1) if routes else None
