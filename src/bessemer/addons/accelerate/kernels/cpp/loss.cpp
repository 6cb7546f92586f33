// Rows of logits, in place: cross entropy, log-probabilities and entropy, with their gradients. A block of rows fits
// the second-level cache, where the caller's product has just put it.
#include "parallel.hpp"

namespace {

constexpr float LARGEST = std::numeric_limits<float>::max();

// A row as float32 vectors; elements past V count as `beyond`.
template <class T, class Each>
INLINE void sweep(const T* row, i64 V, float beyond, const Each& each) {
    i64 v = 0;
    for (; v + W <= V; v += W) each(v, load(row + v), W);
    if (v < V) {
        int left = (int)(V - v);
        float some[W];
        for (int i = 0; i < W; ++i) some[i] = i < left ? widen(row[v + i]) : beyond;
        each(v, load(some), left);
    }
}

// The largest number of a row, and NaN or +inf if the row has one: x - top is then NaN for it.
template <class T>
INLINE float largest(const T* row, i64 V) {
    vf top[4] = {splat(-LARGEST), splat(-LARGEST), splat(-LARGEST), splat(-LARGEST)};
    vf odd = {};
    i64 v = 0;
    for (; v + 4 * W <= V; v += 4 * W)
        for (int j = 0; j < 4; ++j) {
            vf x = load(row + v + j * W);
            top[j] = vmax(x, top[j]);
            odd += x * 0.0f;
        }
    for (; v < V; ++v) {
        float x = widen(row[v]);
        top[0][0] = x > top[0][0] ? x : top[0][0];
        odd[0] += x * 0.0f;
    }
    float best = max_of(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
    float check = sum(odd);  // 0, or NaN if anything is infinite or NaN
    if (check == 0.0f) return best;
    for (i64 i = 0; i < V; ++i) {  // -inf is allowed: a logit of probability 0
        float x = widen(row[i]);
        if (x != x) return x;
    }
    return best;
}

// sum over v of exp(z_v - top), z = logits * factor; and of exp(z_v - top) * (z_v - top) in *weighted.
template <bool WEIGHTED, class T>
INLINE float exponentials(const T* row, i64 V, float factor, float top, float* weighted) {
    vf total[2] = {}, product = {};
    int turn = 0;
    sweep(row, V, -std::numeric_limits<float>::infinity(), [&](i64, vf x, int) {
        vf d = x * factor - top, e = vexp(d);
        total[turn ^= 1] += e;
        if (WEIGHTED) product += select((vi)(e == 0.0f), (vf){}, e * d);
    });
    if (WEIGHTED) *weighted = sum(product);
    return sum(total[0] + total[1]);
}

// The same sum for a factor of 1; overwrites the row with the addends.
template <class T>
INLINE float replaced(T* row, i64 V, float top) {
    vf total[2] = {};
    int turn = 0;
    sweep(row, V, -std::numeric_limits<float>::infinity(), [&](i64 v, vf x, int n) {
        vf e = vexp(x - top);
        total[turn ^= 1] += e;
        store_some(row + v, e, n);
    });
    return sum(total[0] + total[1]);
}

// nll_c = -log softmax(z)[target]; with a gradient the row becomes weight_c (softmax(z) - onehot).
template <class T>
void cross_entropy(T* logits, const i64* target, const float* weight, float* nll, i64 C, i64 V, bool gradient, int threads) {
    parallel(C, threads, [&](i64 c) {
        T* row = logits + c * V;
        float top = largest(row, V), chosen = widen(row[target[c]]);
        constexpr bool KEEP = sizeof(T) == 4;  // exp(z - top) replaces z; BF16 would round twice
        float total = gradient && KEEP ? replaced(row, V, top) : exponentials<false>(row, V, 1.0f, top, nullptr);
        nll[c] = __builtin_logf(total) - (chosen - top);
        if (!gradient) return;
        vf scale = splat(weight[c] / total);
        sweep(row, V, 0.0f, [&](i64 v, vf x, int n) { store_some(row + v, (KEEP ? x : vexp(x - top)) * scale, n); });
        put(row + target[c], weight[c] * (__builtin_expf(chosen - top) / total - 1.0f));
    });
}

// logp_c and lse_c of z = logits / temperature, and the entropy if requested.
template <class T>
void logprobs(const T* logits, const i64* target, float* logp, float* lse, float* entropy, i64 C, i64 V, float temperature, int threads) {
    float factor = 1.0f / temperature;
    parallel(C, threads, [&](i64 c) {
        const T* row = logits + c * V;
        float top = largest(row, V) * factor, weighted = 0.0f, total;
        if (entropy)
            total = exponentials<true>(row, V, factor, top, &weighted);
        else
            total = exponentials<false>(row, V, factor, top, nullptr);
        float log_total = __builtin_logf(total);
        lse[c] = top + log_total;
        logp[c] = widen(row[target[c]]) * factor - top - log_total;
        if (entropy) entropy[c] = log_total - weighted / total;
    });
}

// The row becomes d loss / d logits = [g (onehot - p) - h p (log p + H)] / temperature, with g and h the gradients of
// logp and of the entropy H.
template <class T>
void logprobs_backward(T* logits, const i64* target, const float* lse, const float* entropy, const float* g, const float* h, i64 C, i64 V, float temperature, int threads) {
    float factor = 1.0f / temperature;
    parallel(C, threads, [&](i64 c) {
        T* row = logits + c * V;
        i64 t = target[c];
        float chosen = widen(row[t]) * factor - lse[c], own = g[c] * factor;
        float slope = h ? h[c] * factor : 0.0f, middle = h ? entropy[c] : 0.0f;
        float p = __builtin_expf(chosen);
        float result = own - p * (h ? slope * (chosen + middle) + own : own);
        if (h)
            sweep(row, V, 0.0f, [&](i64 v, vf x, int n) {
                vf d = x * factor - lse[c], e = vexp(d);
                vf change = -e * ((d + middle) * slope + own);
                store_some(row + v, select((vi)(e == 0.0f), (vf){}, change), n);
            });
        else
            sweep(row, V, 0.0f, [&](i64 v, vf x, int n) { store_some(row + v, vexp(x * factor - lse[c]) * -own, n); });
        put(row + t, result);
    });
}

}  // namespace

#define FUNCTIONS(T, suffix)                                                                                         \
    extern "C" EXPORT void cross_entropy_##suffix(T* logits, const i64* target, const float* weight, float* nll,     \
                                                  i64 C, i64 V, i64 gradient, i64 threads) {                         \
        cross_entropy(logits, target, weight, nll, C, V, gradient != 0, (int)threads);                               \
    }                                                                                                                \
    extern "C" EXPORT void logprobs_##suffix(const T* logits, const i64* target, float* logp, float* lse,            \
                                             float* entropy, i64 C, i64 V, float temperature, i64 threads) {         \
        logprobs(logits, target, logp, lse, entropy, C, V, temperature, (int)threads);                               \
    }                                                                                                                \
    extern "C" EXPORT void logprobs_backward_##suffix(T* logits, const i64* target, const float* lse,                \
                                                      const float* entropy, const float* g, const float* h, i64 C,   \
                                                      i64 V, float temperature, i64 threads) {                       \
        logprobs_backward(logits, target, lse, entropy, g, h, C, V, temperature, (int)threads);                      \
    }
FUNCTIONS(float, float32)
FUNCTIONS(bf16, bfloat16)
