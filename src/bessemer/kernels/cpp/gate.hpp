// The gate's decision for one token (DeepSeekMoE, V3 2.1.2), as `model.moe.Gate.choose` makes it.
#pragma once

#include "parallel.hpp"

struct GateRule {
    i64 E, K;        // experts, and how many of them each token gets
    i64 groups;      // of consecutive experts; 1 where groups play no part
    i64 limited;     // groups that a token may use
    i64 rated;       // best experts of a group whose sum rates it
    bool softmax;    // scores are a softmax; else sigmoids
    bool normalise;  // gates are divided by their sum
    float scale;     // and multiplied by this
};

// Whether x comes before y in descending order. NaN is the largest number, as in torch.topk.
INLINE bool before(float x, float y) { return x > y || (x != x && y == y); }

// The indices of the `count` largest of n numbers, in descending order, among equals the first; `taken` is scratch.
INLINE void largest_of(const float* z, i64 n, i64 count, i64* index, bool* taken) {
    for (i64 i = 0; i < n; ++i) taken[i] = false;
    for (i64 k = 0; k < count; ++k) {
        i64 best = -1;
        for (i64 i = 0; i < n; ++i)
            if (!taken[i] && (best < 0 || before(z[i], z[best]))) best = i;
        taken[best] = true;
        index[k] = best;
    }
}

// Scores of a token from its logits, in place.
INLINE void gate_scores(float* s, const GateRule& rule) {
    i64 E = rule.E;
    if (!rule.softmax) {
        for (i64 e = 0; e < E; e += W) {
            int left = (int)least(W, E - e);
            if (left == W)
                store(s + e, vsigmoid(load(s + e)));
            else
                store_part(s + e, vsigmoid(load_part(s + e, left)), left);
        }
        return;
    }
    float top = s[0], total = 0.0f;
    for (i64 e = 1; e < E; ++e) top = before(s[e], top) ? s[e] : top;
    for (i64 e = 0; e < E; e += W) {
        int left = (int)least(W, E - e);
        store_part(s + e, vexp((left == W ? load(s + e) : load_part(s + e, left)) - top), left);
    }
    for (i64 e = 0; e < E; ++e) total += s[e];
    for (i64 e = 0; e < E; ++e) s[e] /= total;
}

// The K experts of a token by scores + bias (null: no bias). `room`: 2 E floats and 2 E bools.
INLINE void choose_experts(const float* score, const float* bias, const GateRule& rule, i64* expert, float* room, bool* taken) {
    i64 E = rule.E, size = E / rule.groups;
    float* z = room;
    for (i64 e = 0; e < E; ++e) z[e] = bias ? score[e] + bias[e] : score[e];
    if (rule.groups > 1) {
        float* rating = room + E;
        i64 best[64], kept[64];
        bool* used = taken + E;
        for (i64 g = 0; g < rule.groups; ++g) {
            rating[g] = 0.0f;
            largest_of(z + g * size, size, rule.rated, best, taken);
            for (i64 k = 0; k < rule.rated; ++k) rating[g] += z[g * size + best[k]];
        }
        largest_of(rating, rule.groups, rule.limited, kept, used);
        for (i64 g = 0; g < rule.groups; ++g)
            if (!used[g])
                for (i64 e = g * size; e < (g + 1) * size; ++e) z[e] = -std::numeric_limits<float>::infinity();
    }
    largest_of(z, E, rule.K, expert, taken);
}

// Gates of the chosen experts.
INLINE void gate_weights(const float* score, const i64* expert, const GateRule& rule, float* weight) {
    float total = 0.0f;
    for (i64 k = 0; k < rule.K; ++k) total += score[expert[k]];
    float factor = rule.normalise ? rule.scale / (total + 1e-20f) : rule.scale;
    for (i64 k = 0; k < rule.K; ++k) weight[k] = score[expert[k]] * factor;
}
