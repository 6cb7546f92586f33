// The gate's decision (DeepSeekMoE, V3 2.1.2) for TOKENS tokens at once, as `model.gate.Gate` makes it. Tokens are the
// lanes of vectors, [experts, TOKENS], so that choosing needs no branches.
#pragma once

#include "parallel.hpp"

constexpr i64 TOKENS = 64;

struct GateRule {
    i64 E, K;        // experts, and how many of them each token gets
    i64 groups;      // of consecutive experts; 1 where groups play no part
    i64 limited;     // groups that a token may use
    i64 rated;       // best experts of a group whose sum rates it
    bool softmax;    // scores are a softmax; else sigmoids
    bool normalise;  // gates are divided by their sum
    float scale;     // and multiplied by this
};

// The largest numbers so far, in descending order, among equals the first; `index` says which they are.
INLINE void insert(vf* best, vi* index, i64 count, vf x, vi i) {
    for (i64 k = 0; k < count; ++k) {
        vi larger = (vi)(x > best[k]);
        vf x_below = select(larger, best[k], x);
        vi i_below = (larger & index[k]) | (~larger & i);
        best[k] = select(larger, x, best[k]);
        index[k] = (larger & i) | (~larger & index[k]);
        x = x_below, i = i_below;
    }
}

// Scores [E, TOKENS] from logits, in place. Of all these functions: the first `tokens`, a multiple of W.
inline void gate_scores(float* s, const GateRule& rule, i64 tokens = TOKENS) {
    for (i64 t = 0; t < tokens; t += W) {
        if (!rule.softmax) {
            for (i64 e = 0; e < rule.E; ++e) store(s + e * TOKENS + t, vsigmoid(load(s + e * TOKENS + t)));
            continue;
        }
        vf top = load(s + t), total = {};
        for (i64 e = 1; e < rule.E; ++e) top = vmax(load(s + e * TOKENS + t), top);
        for (i64 e = 0; e < rule.E; ++e) {
            vf x = vexp(load(s + e * TOKENS + t) - top);
            total += x;
            store(s + e * TOKENS + t, x);
        }
        for (i64 e = 0; e < rule.E; ++e) store(s + e * TOKENS + t, load(s + e * TOKENS + t) / total);
    }
}

// Experts [K, TOKENS] by scores + bias (null: no bias). NaN counts as the largest number, as in torch.topk.
// `room`: (E + 2 groups) W floats, aligned.
inline void choose_experts(const float* score, const float* bias, const GateRule& rule, int32_t* expert, float* room, i64 tokens = TOKENS) {
    const float infinity = std::numeric_limits<float>::infinity();
    i64 E = rule.E, size = E / rule.groups;
    vf best[64], *z = (vf*)room, *rating = z + E;
    vi index[64];
    for (i64 t = 0; t < tokens; t += W) {
        for (i64 e = 0; e < E; ++e) {
            vf x = load(score + e * TOKENS + t);
            if (bias) x += bias[e];
            z[e] = select((vi)(x != x), splat(infinity), x);
        }
        for (i64 g = 0; g < rule.groups && rule.groups > 1; ++g) {
            for (i64 k = 0; k < rule.rated; ++k) best[k] = splat(-infinity), index[k] = (vi){};
            for (i64 e = g * size; e < (g + 1) * size; ++e) insert(best, index, rule.rated, z[e], (vi){});
            rating[g] = (vf){};
            for (i64 k = 0; k < rule.rated; ++k) rating[g] += best[k];
        }
        for (i64 g = 0; g < rule.groups && rule.groups > 1; ++g) {
            vi ahead = {};  // groups that come before this one
            for (i64 h = 0; h < rule.groups; ++h)
                ahead -= (vi)(h < g ? rating[h] >= rating[g] : rating[h] > rating[g]);
            vi excluded = (vi)(ahead >= (int32_t)rule.limited);
            for (i64 e = g * size; e < (g + 1) * size; ++e) z[e] = select(excluded, splat(-infinity), z[e]);
        }
        for (i64 k = 0; k < rule.K; ++k) best[k] = splat(-infinity), index[k] = (vi){} + (int32_t)k;
        for (i64 e = 0; e < E; ++e) insert(best, index, rule.K, z[e], (vi){} + (int32_t)e);
        for (i64 k = 0; k < rule.K; ++k) memcpy(expert + k * TOKENS + t, &index[k], sizeof(vi));
    }
}
