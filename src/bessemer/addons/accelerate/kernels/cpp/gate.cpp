// The gate of a whole micro-batch, forward and backward, with the sequence-wise balance loss (V3 eq. 17-20).
#include "gate.hpp"
#include "gemm.hpp"

namespace {

// The largest numbers so far and their indices, in descending order; among equals the first comes first.
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

}  // namespace

void gate_scores(float* s, const GateRule& rule, i64 tokens) {
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

void choose_experts(const float* score, const float* bias, const GateRule& rule, int32_t* expert, float* room,
                    i64 tokens) {
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

namespace {

constexpr i64 BLOCK = 512;  // tokens per task; fixed, so that sums do not depend on the number of threads

// Scores are stored as [N / TOKENS, E, TOKENS]; entries of the last block beyond N are finite and meaningless.
template <class T>
void forward(const T* x, const float* w, const float* bias, const i64* choice, i64* expert, float* weight, float* score, i64 N, i64 D, const GateRule& rule, int threads) {
    i64 E = rule.E, K = rule.K;
    parallel((N + BLOCK - 1) / BLOCK, threads, [&](i64 block) {
        float* right = scratch<0, float>(FloatGemm::b_size(D, TOKENS));
        float* room = scratch<1, float>((E + 2 * rule.groups) * W);
        int32_t* chosen = scratch<2, int32_t>(K * TOKENS);
        for (i64 n = block * BLOCK; n < least(N, (block + 1) * BLOCK); n += TOKENS) {
            i64 tokens = least(TOKENS, N - n);
            float* s = score + n * E;
            FloatGemm::pack_b(right, x + n * D, D, tokens, 1, D);
            if (tokens < TOKENS) memset(s, 0, E * TOKENS * sizeof(float));
            FloatGemm::multiply(E, tokens, D, w, D, right, s, TOKENS, false);
            gate_scores(s, rule);
            choose_experts(s, bias, rule, chosen, room);
            for (i64 t = 0; t < tokens; ++t) {
                i64* mine = expert + (n + t) * K;
                float *gate = weight + (n + t) * K, total = 0.0f;
                for (i64 k = 0; k < K; ++k) {
                    mine[k] = choice && choice[(n + t) * K + k] >= 0 ? choice[(n + t) * K + k] : chosen[k * TOKENS + t];
                    gate[k] = s[mine[k] * TOKENS + t];
                    total += gate[k];
                }
                float factor = rule.normalise ? rule.scale / (total + 1e-20f) : rule.scale;
                for (i64 k = 0; k < K; ++k) gate[k] *= factor;
            }
        }
    });
}

// Sum over the experts for W tokens of a block.
INLINE vf over_experts(const float* s, i64 E, i64 t) {
    vf total = {};
    for (i64 e = 0; e < E; ++e) total += load(s + e * TOKENS + t);
    return total;
}

// count [S, E]; returns sum over sequences of sum_i f_i P_i. The shares are added up block by block in `share` [S, E].
float balance(const i64* expert, const float* score, float* count, float* share, i64 S, i64 T, const GateRule& rule) {
    i64 E = rule.E, K = rule.K, N = S * T;
    memset(count, 0, S * E * sizeof(float));
    memset(share, 0, S * E * sizeof(float));
    for (i64 n = 0; n < N; ++n)
        for (i64 k = 0; k < K; ++k) count[n / T * E + expert[n * K + k]] += 1.0f;
    alignas(64) float inverse[TOKENS];
    for (i64 n = 0; n < N; n += TOKENS) {
        const float* s = score + n * E;
        for (i64 t = 0; t < TOKENS; t += W) store(inverse + t, 1.0f / over_experts(s, E, t));
        for (i64 first = n; first < least(N, n + TOKENS);) {  // the part of this block within one sequence
            i64 sequence = first / T, end = least(least(N, n + TOKENS), (sequence + 1) * T);
            for (i64 e = 0; e < E; ++e) {
                const float* mine = s + e * TOKENS;
                float* total = share + sequence * E + e;
                i64 t = first - n;
                vf part = {};
                for (; t + W <= end - n; t += W) part += load(mine + t) * load(inverse + t);
                *total += sum(part);
                for (; t < end - n; ++t) *total += mine[t] * inverse[t];
            }
            first = end;
        }
    }
    float f = (float)E / (float)(K * T), mean = 1.0f / (float)T, total = 0.0f;
    for (i64 i = 0; i < S * E; ++i) total += count[i] * f * (share[i] * mean);
    return total;
}

// Gradients of x and w. dweight [N, K]; dbalance: that of the balance term; count as `balance` wrote it.
template <class X>
void backward(const float* dweight, float dbalance, const X* x, const float* w, const i64* expert, const float* score, const float* count, X* dx, float* dw, float* partial, i64 N, i64 D, i64 S, const GateRule& rule, int threads) {
    i64 E = rule.E, K = rule.K, T = N / S, blocks = (N + BLOCK - 1) / BLOCK;
    float f = dbalance * (float)E / ((float)(K * T) * (float)T);
    parallel(blocks, threads, [&](i64 block) {
        float* right = scratch<0, float>(FloatGemm::b_size(E, D));
        float* rows = scratch<1, float>(FloatGemm::b_size(TOKENS, D));
        float* slope = scratch<2, float>(E * TOKENS);
        float* out = scratch<3, float>(TOKENS * D);
        float* mine = partial + block * E * D;
        FloatGemm::pack_b(right, w, E, D, D, 1);
        for (i64 n = block * BLOCK; n < least(N, (block + 1) * BLOCK); n += TOKENS) {
            i64 tokens = least(TOKENS, N - n);
            const float* s = score + n * E;
            memset(slope, 0, E * TOKENS * sizeof(float));
            // balance term: share_e = s_e / sum s, with gradient f count_e
            for (i64 t = 0; t < TOKENS && f != 0.0f; t += W) {
                i64 first = (n + t) / T, last = (n + t + W - 1) / T;
                auto counted = [&](i64 e) {
                    if (first == last) return splat(count[first * E + e]);
                    float each[W];
                    for (i64 i = 0; i < W; ++i) each[i] = count[least((n + t + i) / T, S - 1) * E + e];
                    return load(each);
                };
                if (first >= S) break;
                vf inverse = 1.0f / over_experts(s, E, t), inner = {};
                for (i64 e = 0; e < E; ++e) inner += counted(e) * load(s + e * TOKENS + t);
                inner *= inverse;
                for (i64 e = 0; e < E; ++e) store(slope + e * TOKENS + t, f * (counted(e) - inner) * inverse);
            }
            for (i64 t = 0; t < tokens; ++t) {
                const float* dg = dweight + (n + t) * K;
                const i64* chosen = expert + (n + t) * K;
                float total = 0.0f, inner = 0.0f, factor = rule.scale;
                if (rule.normalise) {
                    for (i64 k = 0; k < K; ++k) total += s[chosen[k] * TOKENS + t];
                    total += 1e-20f;
                    for (i64 k = 0; k < K; ++k) inner += dg[k] * s[chosen[k] * TOKENS + t];
                    inner /= total;
                    factor /= total;
                }
                for (i64 k = 0; k < K; ++k) slope[chosen[k] * TOKENS + t] += (dg[k] - inner) * factor;
            }
            for (i64 t = 0; t < TOKENS; t += W) {
                vf middle = {};
                if (rule.softmax)
                    for (i64 e = 0; e < E; ++e) middle += load(slope + e * TOKENS + t) * load(s + e * TOKENS + t);
                for (i64 e = 0; e < E; ++e) {
                    vf d = load(slope + e * TOKENS + t), p = load(s + e * TOKENS + t);
                    store(slope + e * TOKENS + t, rule.softmax ? (d - middle) * p : d * p * (1.0f - p));
                }
            }
            FloatGemm::multiply(tokens, D, E, slope, 1, TOKENS, right, out, D, false);
            each_vector(tokens * D, [&](i64 i, int left) { store_some(dx + n * D + i, load_some(out + i, left), left); });
            FloatGemm::pack_b(rows, x + n * D, tokens, D, D, 1);
            FloatGemm::multiply(E, D, tokens, slope, TOKENS, 1, rows, mine, D, n > block * BLOCK);
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

extern "C" EXPORT void gate_balance(const i64* expert, const float* score, float* count, float* share, float* result, i64 S,
                                    i64 T, RULE) {
    *result = balance(expert, score, count, share, S, T, rule_of(E, K, groups, limited, rated, softmax, normalise, scale));
}
