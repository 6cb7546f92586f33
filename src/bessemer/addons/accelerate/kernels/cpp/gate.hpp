// The gate's decision (DeepSeekMoE, V3 2.1.2) for TOKENS tokens at once, as `model.gate.Gate` makes it. Tokens are the
// lanes of vectors, [experts, TOKENS], so that choosing needs no branches.
#pragma once

#include "parallel.hpp"

constexpr i64 TOKENS = 64;

struct GateRule {
    i64 E, K;        // experts, and how many of them each token gets
    i64 groups;      // of consecutive experts; 1 if groups do not matter
    i64 limited;     // groups that a token may use
    i64 rated;       // best experts of a group whose sum rates it
    bool softmax;    // scores are a softmax; else sigmoids
    bool normalise;  // gates are divided by their sum
    float scale;     // and multiplied by this
};

// Scores [E, TOKENS] from logits, in place. All these functions process the first `tokens`, a multiple of W.
void gate_scores(float* s, const GateRule& rule, i64 tokens = TOKENS);

// Experts [K, TOKENS] by scores + bias (null: no bias). NaN counts as the largest number, as in torch.topk.
// `room`: (E + 2 groups) W floats, aligned.
void choose_experts(const float* score, const float* bias, const GateRule& rule, int32_t* expert, float* room,
                    i64 tokens = TOKENS);
