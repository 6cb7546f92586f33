// The gate of a whole micro-batch, forward and backward, with the sequence-wise balance loss (V3 eq. 17-20).
#include "gate.hpp"
#include "gemm.hpp"

namespace {

constexpr i64 BLOCK = 512;  // tokens of a task; fixed, so that sums do not depend on the number of threads
constexpr i64 FEW = 64;     // tokens of one product

template <class T>
void forward(const T* x, const float* w, const float* bias, const i64* choice, i64* expert, float* weight, float* score, i64 N, i64 D, const GateRule& rule, int threads) {
    i64 E = rule.E, K = rule.K;
    parallel((N + BLOCK - 1) / BLOCK, threads, [&](i64 block) {
        float* right = scratch<0, float>(FloatGemm::b_size(D, E));
        float* left = scratch<1, float>(FEW * D);
        float* room = scratch<2, float>(2 * E);
        bool* taken = scratch<3, bool>(2 * E);
        FloatGemm::pack_b(right, w, D, E, 1, D);
        for (i64 n = block * BLOCK; n < least(N, (block + 1) * BLOCK); n += FEW) {
            i64 tokens = least(FEW, least(N, (block + 1) * BLOCK) - n);
            FloatGemm::pack_a(left, x + n * D, tokens, D, D, 1);
            FloatGemm::multiply(tokens, E, D, left, D, right, score + n * E, E, false);
            for (i64 t = n; t < n + tokens; ++t) {
                float* s = score + t * E;
                i64* mine = expert + t * K;
                gate_scores(s, rule);
                choose_experts(s, bias, rule, mine, room, taken);
                if (choice)
                    for (i64 k = 0; k < K; ++k)
                        if (choice[t * K + k] >= 0) mine[k] = choice[t * K + k];
                gate_weights(s, mine, rule, weight + t * K);
            }
        }
    });
}

// count [S, E]; returns sum over sequences of sum_i f_i P_i.
float balance(const i64* expert, const float* score, float* count, i64 S, i64 T, const GateRule& rule, int threads) {
    i64 E = rule.E, K = rule.K;
    float* term = scratch<4, float>(S);
    parallel(S, threads, [&](i64 s) {
        float* mine = count + s * E;
        float* share = scratch<5, float>(E);
        for (i64 e = 0; e < E; ++e) mine[e] = share[e] = 0.0f;
        for (i64 i = s * T * K; i < (s + 1) * T * K; ++i) mine[expert[i]] += 1.0f;
        for (i64 t = s * T; t < (s + 1) * T; ++t) {
            float total = 0.0f;
            for (i64 e = 0; e < E; ++e) total += score[t * E + e];
            float inverse = 1.0f / total;
            for (i64 e = 0; e < E; ++e) share[e] += score[t * E + e] * inverse;
        }
        float f = (float)E / (float)(K * T), mean = 1.0f / (float)T, sum = 0.0f;
        for (i64 e = 0; e < E; ++e) sum += mine[e] * f * (share[e] * mean);
        term[s] = sum;
    });
    float total = 0.0f;
    for (i64 s = 0; s < S; ++s) total += term[s];
    return total;
}

// Gradients of x and w. dweight [N, K]; dbalance: of the balance term; count as the forward left it.
template <class X>
void backward(const float* dweight, float dbalance, const X* x, const float* w, const i64* expert, const float* score, const float* count, X* dx, float* dw, float* partial, i64 N, i64 D, i64 S, const GateRule& rule, int threads) {
    i64 E = rule.E, K = rule.K, T = N / S, blocks = (N + BLOCK - 1) / BLOCK;
    float f = dbalance * (float)E / ((float)(K * T) * (float)T);
    parallel(blocks, threads, [&](i64 block) {
        float* right = scratch<0, float>(FloatGemm::b_size(E, D));
        float* rows = scratch<1, float>(FloatGemm::b_size(FEW, D));
        float* slope = scratch<2, float>(FEW * E);
        float* out = scratch<6, float>(FEW * D);
        float* mine = partial + block * E * D;
        FloatGemm::pack_b(right, w, E, D, D, 1);
        bool first = true;
        for (i64 n = block * BLOCK; n < least(N, (block + 1) * BLOCK); n += FEW, first = false) {
            i64 tokens = least(FEW, least(N, (block + 1) * BLOCK) - n);
            for (i64 t = n; t < n + tokens; ++t) {
                const float *s = score + t * E, *counted = count + t / T * E, *dg = dweight + t * K;
                float* d = slope + (t - n) * E;
                // of the balance term: share_e = s_e / sum s, with gradient f * count_e
                if (f != 0.0f) {
                    float total = 0.0f, inner = 0.0f;
                    for (i64 e = 0; e < E; ++e) total += s[e];
                    for (i64 e = 0; e < E; ++e) inner += counted[e] * s[e];
                    float inverse = 1.0f / total;
                    inner *= inverse;
                    for (i64 e = 0; e < E; ++e) d[e] = f * (counted[e] - inner) * inverse;
                } else {
                    for (i64 e = 0; e < E; ++e) d[e] = 0.0f;
                }
                const i64* chosen = expert + t * K;
                float total = 0.0f, inner = 0.0f, factor = rule.scale;
                if (rule.normalise) {
                    for (i64 k = 0; k < K; ++k) total += s[chosen[k]];
                    total += 1e-20f;
                    for (i64 k = 0; k < K; ++k) inner += dg[k] * s[chosen[k]];
                    inner /= total;
                    factor /= total;
                }
                for (i64 k = 0; k < K; ++k) d[chosen[k]] += (dg[k] - inner) * factor;
                if (rule.softmax) {
                    float middle = 0.0f;
                    for (i64 e = 0; e < E; ++e) middle += d[e] * s[e];
                    for (i64 e = 0; e < E; ++e) d[e] = (d[e] - middle) * s[e];
                } else {
                    for (i64 e = 0; e < E; ++e) d[e] *= s[e] * (1.0f - s[e]);
                }
            }
            FloatGemm::multiply(tokens, D, E, slope, E, right, out, D, false);
            for (i64 i = 0; i < tokens * D; i += W) {
                int left = (int)least(W, tokens * D - i);
                if (left == W)
                    store(dx + n * D + i, load(out + i));
                else
                    store_part(dx + n * D + i, load_part(out + i, left), left);
            }
            FloatGemm::pack_b(rows, x + n * D, tokens, D, D, 1);
            FloatGemm::multiply(E, D, tokens, slope, 1, E, rows, mine, D, !first);
        }
    });
    memcpy(dw, partial, E * D * sizeof(float));
    for (i64 block = 1; block < blocks; ++block)
        for (i64 i = 0; i < E * D; ++i) dw[i] += partial[block * E * D + i];
}

GateRule rule_of(i64 E, i64 K, i64 groups, i64 limited, i64 rated, i64 softmax, i64 normalise, float scale) {
    return {E, K, groups, limited, rated, softmax != 0, normalise != 0, scale};
}

}  // namespace

#define RULE i64 E, i64 K, i64 groups, i64 limited, i64 rated, i64 softmax, i64 normalise, float scale
#define FUNCTIONS(T, suffix)                                                                                          \
    extern "C" EXPORT void gate_##suffix(const T* x, const float* w, const float* bias, const i64* choice,           \
                                         i64* expert, float* weight, float* score, i64 N, i64 D, RULE, i64 threads) { \
        GateRule rule = rule_of(E, K, groups, limited, rated, softmax, normalise, scale);                             \
        forward(x, w, bias, choice, expert, weight, score, N, D, rule, (int)threads);                                 \
    }                                                                                                                 \
    extern "C" EXPORT void gate_backward_##suffix(const float* dweight, const float* dbalance, const T* x,            \
                                                  const float* w, const i64* expert, const float* score,              \
                                                  const float* count, T* dx, float* dw, float* partial, i64 N, i64 D, \
                                                  i64 S, RULE, i64 threads) {                                         \
        GateRule rule = rule_of(E, K, groups, limited, rated, softmax, normalise, scale);                             \
        backward(dweight, *dbalance, x, w, expert, score, count, dx, dw, partial, N, D, S, rule, (int)threads);       \
    }
FUNCTIONS(float, float32)
FUNCTIONS(bf16, bfloat16)

extern "C" EXPORT void gate_balance(const i64* expert, const float* score, float* count, float* result, i64 S, i64 T, RULE,
                                    i64 threads) {
    *result = balance(expert, score, count, S, T, rule_of(E, K, groups, limited, rated, softmax, normalise, scale), (int)threads);
}
