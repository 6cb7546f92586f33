"""A second implementation, written from the papers over the keys on disk: float64, one token and one head at a time.

It shares no code with `bessemer.model` except the config, and is slow and plain on purpose.
"""

import math

import torch
from safetensors.torch import load_file


class Naive:
    """Equations of V2 2.1, V3 2.1 and V3 2.2, over the tensors of a Hugging Face directory."""

    def __init__(self, directory, cfg):
        self.w = {key: tensor.double() for key, tensor in load_file(directory / "model.safetensors").items()}
        self.cfg = cfg

    def main(self, tokens_T):
        """(h^0 after the final norm [T, D], logits [T, V])."""
        x = self.w["model.embed_tokens.weight"][tokens_T]
        for i in range(self.cfg.n_layers):
            x = self.block(x, f"model.layers.{i}.")
        h = self.norm(x, "model.norm.weight", self.cfg.norm_eps)
        return h, h @ self.w["lm_head.weight"].T

    def mtp(self, tokens_T):
        """Logits of every depth k = 1..D: entry k-1 is [T-k, V]; row i predicts token i+k+1."""
        h, _ = self.main(tokens_T)
        hidden = []
        for k in range(1, self.cfg.n_mtp + 1):
            p = f"model.layers.{self.cfg.n_layers + k - 1}."
            rows = []
            for i in range(len(tokens_T) - k):
                embedded = self.norm(self.w[p + "embed_tokens.weight"][tokens_T[i + k]], p + "enorm.weight")
                rows.append(torch.cat((embedded, self.norm(h[i], p + "hnorm.weight"))) @ self.w[p + "eh_proj.weight"].T)
            h = self.block(torch.stack(rows), p)
            hidden.append(self.norm(h, p + "shared_head.norm.weight") @ self.w[p + "shared_head.head.weight"].T)
        return hidden

    def norm(self, z, key, eps=None):
        eps = self.cfg.norm_eps if eps is None else eps
        return self.w[key] * z / torch.sqrt((z * z).mean(-1, keepdim=True) + eps)

    def block(self, x, p):
        x = x + self.attention(self.norm(x, p + "input_layernorm.weight"), p + "self_attn.")
        u = self.norm(x, p + "post_attention_layernorm.weight")
        if p + "mlp.gate.weight" not in self.w:
            return x + self.ffn(u, p + "mlp.")
        return x + torch.stack([self.moe(row, p + "mlp.") for row in u])

    def angle(self, j):
        """theta_j of V3 4.3 with YaRN."""
        cfg, R = self.cfg, self.cfg.qk_rope_head_dim
        theta = cfg.rope_theta ** (-2 * j / R)
        if cfg.rope_factor == 1:
            return theta
        fast, slow = (math.log(cfg.original_seq_len / (2 * math.pi * n)) for n in (32, 1))
        pair = R / (2 * math.log(cfg.rope_theta))
        low, high = max(math.floor(fast * pair), 0), min(math.ceil(slow * pair), R - 1)
        ramp = min(max((j - low) / (high - low), 0), 1)
        return theta * (1 - ramp) + theta / cfg.rope_factor * ramp

    def rotate(self, x, position):
        """Pairs (x_2j, x_2j+1) as complex numbers, multiplied by e^(i position theta_j)."""
        out = torch.empty_like(x)
        for j in range(len(x) // 2):
            turned = complex(x[2 * j], x[2 * j + 1]) * complex(math.cos(position * self.angle(j)),
                                                               math.sin(position * self.angle(j)))  # fmt: skip
            out[2 * j], out[2 * j + 1] = turned.real, turned.imag
        return out

    def attention(self, x, p):
        cfg, w = self.cfg, self.w
        H, N, R, C = cfg.n_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.kv_lora_rank
        scale = (N + R) ** -0.5
        if cfg.rope_factor > 1:
            scale *= (0.1 * cfg.mscale_all_dim * math.log(cfg.rope_factor) + 1) ** 2
        if cfg.q_lora_rank:
            q = self.norm(x @ w[p + "q_a_proj.weight"].T, p + "q_a_layernorm.weight", 1e-6) @ w[p + "q_b_proj.weight"].T
        else:
            q = x @ w[p + "q_proj.weight"].T
        joint = x @ w[p + "kv_a_proj_with_mqa.weight"].T
        latent = self.norm(joint[:, :C], p + "kv_a_layernorm.weight", 1e-6) if C else x
        kv = latent @ w[p + "kv_b_proj.weight"].T
        if cfg.kv_norm:
            kv = self.norm(kv, p + "kv_a_layernorm.weight", 1e-6)
        k_rope = [self.rotate(joint[t, C:], t) for t in range(len(x))]
        heads = []
        for i in range(H):
            q_i = q[:, i * (N + R) : (i + 1) * (N + R)]
            g = i * cfg.n_kv_heads // H if cfg.n_kv_heads else i  # consecutive heads share keys and values
            kv_i = kv[:, g * (N + cfg.v_head_dim) : (g + 1) * (N + cfg.v_head_dim)]
            rows = []
            for t in range(len(x)):
                query = torch.cat((q_i[t, :N], self.rotate(q_i[t, N:], t)))
                keys = torch.stack([torch.cat((kv_i[s, :N], k_rope[s])) for s in range(t + 1)])
                rows.append((keys @ query * scale).softmax(0) @ kv_i[: t + 1, N:])
            heads.append(torch.stack(rows))
        return torch.cat(heads, -1) @ w[p + "o_proj.weight"].T

    def ffn(self, u, p):
        gate, up = u @ self.w[p + "gate_proj.weight"].T, u @ self.w[p + "up_proj.weight"].T
        return (gate * torch.sigmoid(gate) * up) @ self.w[p + "down_proj.weight"].T

    def moe(self, u, p):
        """V3 2.1.2 for one token: sigmoid, group limit on biased scores, gates from unbiased scores."""
        cfg = self.cfg
        s = torch.sigmoid(self.w[p + "gate.weight"] @ u).tolist()
        z = [a + b for a, b in zip(s, self.w[p + "gate.e_score_correction_bias"].tolist(), strict=True)]
        size = cfg.n_routed_experts // cfg.n_expert_groups
        group = [sum(sorted(z[g * size : (g + 1) * size])[-2:]) for g in range(cfg.n_expert_groups)]
        groups_kept = sorted(range(len(group)), key=group.__getitem__)[-cfg.n_limited_groups :]
        allowed = [e for e in range(len(z)) if e // size in groups_kept]
        chosen = sorted(allowed, key=z.__getitem__)[-cfg.n_activated_experts :]
        total = sum(s[e] for e in chosen) if cfg.norm_topk_prob else 1.0
        out = self.ffn(u, p + "shared_experts.")
        for e in chosen:
            out = out + cfg.route_scale * s[e] / total * self.ffn(u, f"{p}experts.{e}.")
        return out
