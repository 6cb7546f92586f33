// Draws a row's next token from its logits, as `engine.sampling` defines it: temperature, top-k, top-p of what top-k
// kept, min-p, and the inverse of the cumulative distribution at the row's random number. Log-probabilities are those
// before truncation, or over only the kept tokens if these are recorded.
#pragma once

#include <algorithm>
#include <cmath>

#include "parallel.hpp"

namespace {

constexpr i64 BLOCK = 64;  // tokens that the search skips at once
constexpr float INF = std::numeric_limits<float>::infinity();

struct Rules {
    double temperature, top_p, top_k, min_p;
};

// Number `position` of the key's splitmix64 stream in [0, 1), as `sampling.uniform`.
double uniform(i64 key, i64 position) {
    uint64_t x = (uint64_t)key + (uint64_t)(position + 1) * 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return (double)((x ^ (x >> 31)) >> 11) * 0x1p-53;
}

float largest(const float* x, i64 n) {
    vf most = splat(-INF);
    i64 i = 0;
    for (; i + W <= n; i += W) most = vmax(load(x + i), most);
    float top = max_of(most);
    for (; i < n; ++i) top = x[i] > top ? x[i] : top;
    return top;
}

// The first of n tokens with the largest logit.
i64 most_likely(const float* x, i64 n) {
    float most = largest(x, n);
    i64 i = 0;
    while (i < n && x[i] != most) ++i;
    return i < n ? i : 0;
}

// p = exp((x - top) / temperature) if p is not null, and the sum.
double exponentials(const float* x, i64 n, float top, float temperature, float* p) {
    double total = 0.0;
    for (i64 from = 0; from < n; from += BLOCK) {
        vf part = {};
        for (i64 i = from; i < least(n, from + BLOCK); i += W) {
            int left = (int)least(W, n - i);
            vf value = vexp(((left == W ? load(x + i) : load_part(x + i, left)) - top) / temperature);
            if (left == W) {
                if (p) store(p + i, value);
                part += value;
            } else {
                float some[W];
                store(some, value);
                if (p) store_part(p + i, value, left);
                part += load_part(some, left);
            }
        }
        total += sum(part);
    }
    return total;
}

// The probability of the last token that top-k and top-p keep, of n probabilities in [0, 1]. Bins by exponent and
// leading mantissa bits narrow it down to a few tokens, and only these are sorted.
float last_kept(const float* p, i64 n, i64 top_k, double top_p) {
    constexpr int SHIFT = 20, BINS = (0x3f800000 >> SHIFT) + 1;
    struct Bin {
        i64 count;
        double mass;
    };
    Bin* bins = scratch<70, Bin>(BINS);
    memset((void*)bins, 0, BINS * sizeof(Bin));
    auto bin_of = [&](i64 i) {
        uint32_t bits;
        memcpy(&bits, p + i, 4);
        return std::min<int>(bits >> SHIFT, BINS - 1);
    };
    for (i64 i = 0; i < n; ++i) {
        Bin& bin = bins[bin_of(i)];
        ++bin.count;
        bin.mass += p[i];
    }
    float* members = scratch<71, float>(n);
    // The first token from the top at which `reached` (tokens so far, mass so far) holds; `mass` then includes it.
    auto walk = [&](auto reached, double& mass) {
        i64 count = 0;
        mass = 0.0;
        int b = BINS - 1;
        for (; b > 0 && !reached(count + bins[b].count, mass + bins[b].mass); --b) count += bins[b].count, mass += bins[b].mass;
        i64 found = 0;
        for (i64 i = 0; i < n; ++i)
            if (bin_of(i) == b) members[found++] = p[i];
        std::sort(members, members + found, [](float x, float y) { return x > y; });
        for (i64 i = 0; i < found; ++i) {
            mass += members[i];
            if (reached(++count, mass) || i + 1 == found) return members[i];
        }
        return 0.0f;
    };
    double kept = 0.0, unused;
    float threshold = 0.0f;
    if (top_k < n)
        threshold = walk([&](i64 count, double) { return count >= top_k; }, kept);
    else
        for (int b = 0; b < BINS; ++b) kept += bins[b].mass;
    if (top_p < 1.0) {
        float other = walk([&](i64, double mass) { return mass >= top_p * kept; }, unused);
        threshold = other > threshold ? other : threshold;
    }
    return threshold;
}

// The first of n tokens whose cumulative share exceeds u, of those with p >= threshold; never one with p = 0.
i64 inverse_cdf(const float* p, i64 n, float threshold, double u) {
    i64 blocks = (n + BLOCK - 1) / BLOCK;
    float* shares = scratch<72, float>(blocks);
    double total = 0.0;
    auto kept = [&](i64 i) { return p[i] >= threshold ? p[i] : 0.0f; };
    for (i64 b = 0; b < blocks; ++b) {
        vf part = {};
        for (i64 i = b * BLOCK; i < least(n, (b + 1) * BLOCK); i += W) {
            vf x = n - i >= W ? load(p + i) : load_part(p + i, (int)(n - i));
            part += select((vi)(x >= threshold), x, (vf){});
        }
        total += shares[b] = sum(part);
    }
    // Rounding may carry u * total up to the total itself, beyond the last token that can be sampled.
    double target = std::min(u * total, std::nextafter(total, 0.0)), below = 0.0;
    i64 b = 0;
    for (; b + 1 < blocks && !(below + shares[b] > target); ++b) below += shares[b];
    i64 from = b * BLOCK, end = least(n, from + BLOCK);
    double inside = 0.0, rest = (target - below) / shares[b];
    for (i64 i = from; i < end; ++i) inside += kept(i);
    target = std::min((rest > 0.0 ? rest : 0.0) * inside, std::nextafter(inside, 0.0));
    double reached = 0.0;
    for (i64 i = from; i < end; ++i)
        if ((reached += kept(i)) > target) return i;
    return end - 1;  // reached only by a row of NaN
}

// The distribution of the next token, from a row of V logits: p = exp((x - own) / temperature), of which the first
// `vocab` count if they are at least `threshold`. `own` is the largest of these, so that no spare row, however likely,
// makes them all 0; `total` is the sum over V of exp((x - top) / temperature). Temperature 0 has no p: the most likely
// token is `best`.
struct Distribution {
    const float* x;
    i64 V, vocab;
    const Rules& rules;
    float* p;  // room for V numbers
    float temperature = (float)rules.temperature, top = largest(x, V), own = vocab < V ? largest(x, vocab) : top;
    float base = top, threshold = 0.0f;
    double total = exponentials(x, V, top, greedy() ? 1.0f : temperature, greedy() ? nullptr : p), mass = total;
    i64 best = 0;

    Distribution(const float* x, i64 V, i64 vocab, const Rules& rules, float* p) : x(x), V(V), vocab(vocab), rules(rules), p(p) {
        if (greedy())
            best = most_likely(x, vocab);
        else if (total == total) {
            if (own < top && own > -INF) exponentials(x, vocab, own, temperature, p);
            threshold = (float)rules.min_p * largest(p, vocab);
            i64 k = rules.top_k > 0 && rules.top_k < vocab ? (i64)rules.top_k : vocab;
            if (k < vocab || rules.top_p < 1.0) threshold = std::max(threshold, last_kept(p, vocab, k, rules.top_p));
        }
    }
    bool greedy() const { return temperature == 0.0f; }
    bool finite() const { return total == total; }
    i64 draw(double u) const { return greedy() ? best : finite() ? inverse_cdf(p, vocab, threshold, u) : 0; }

    // Writes which tokens below `vocab` truncation kept; `score` then covers only these.
    void keep(bool* kept) {
        if (greedy() || !finite()) return (void)memset(kept, 0, vocab * sizeof(bool));
        base = own, mass = 0.0;
        for (i64 i = 0; i < vocab; ++i) {
            kept[i] = p[i] >= threshold && p[i] > 0.0f;
            if (kept[i]) mass += p[i];
        }
    }
    // p becomes probabilities of the tokens below `vocab`.
    void normalise() {
        double mass = 0.0;
        for (i64 from = 0; from < vocab; from += BLOCK) {
            vf part = {};
            for (i64 i = from; i < least(vocab, from + BLOCK); i += W) {
                int left = (int)least(W, vocab - i);
                vf some = load_some(p + i, left);
                some = select((vi)(some >= threshold), some, (vf){});
                part += some;
                store_some(p + i, some, left);
            }
            mass += sum(part);
        }
        float scale = (float)(1.0 / mass);
        each_vector(vocab, [&](i64 i, int left) { store_some(p + i, load_some(p + i, left) * scale, left); });
        threshold = 0.0f;
    }
    // After `normalise`: p becomes (p - q)+, the distribution after a draft from q was rejected; unchanged if nothing
    // would be left.
    void exclude(const float* q) {
        vf rest = {};
        auto left_of = [&](i64 i, int left) { return vmax((vf){}, load_some(p + i, left) - load_some(q + i, left)); };
        each_vector(vocab, [&](i64 i, int left) { rest += left_of(i, left); });
        if (sum(rest) > 0.0f) each_vector(vocab, [&](i64 i, int left) { store_some(p + i, left_of(i, left), left); });
    }
    // Log-probabilities of a token: at the row's temperature (0 counts as 1), and at 1 before truncation.
    void score(i64 token, float* logp, float* raw) const {
        float divisor = greedy() ? 1.0f : temperature;
        *logp = (float)((double)((x[token] - base) / divisor) - std::log(mass));
        *raw = (float)((double)(x[token] - top) - std::log(divisor == 1.0f ? total : exponentials(x, V, top, 1.0f, nullptr)));
    }
};

// Log-probabilities of a token before truncation: at a temperature (0 counts as 1), and at 1.
void score(const float* x, i64 V, i64 token, double temperature, float* logp, float* raw) {
    float top = largest(x, V), divisor = temperature == 0.0 ? 1.0f : (float)temperature;
    *raw = *logp = (float)((double)(x[token] - top) - std::log(exponentials(x, V, top, 1.0f, nullptr)));
    if (divisor != 1.0f) *logp = (float)((double)((x[token] - top) / divisor) - std::log(exponentials(x, V, top, divisor, nullptr)));
}

}  // namespace
