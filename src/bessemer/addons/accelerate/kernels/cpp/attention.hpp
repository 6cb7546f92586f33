// The softmax core of multi-head latent attention, forward and backward, without stored probabilities (FlashAttention).
//
// A task is one head of one row. Scores stay transposed, [keys x queries]: the lanes of a vector are queries, so the
// softmax needs no sums across lanes, and P^T and dS^T are already operands of the next products. Operands are rotated
// and laid out while they are packed; the scale is applied to scores, since it would round BF16 operands.
//
//     forward     S^T = K Q^T    P^T = exp(S^T - running maximum)    O^T += V^T P^T
//     backward    S^T = K Q^T    P^T = exp(S^T - log-sum-exp)        dP^T = V dO^T    dS^T = P^T (dP^T - delta)
//                 dV += P^T dO   dK += dS^T Q                        dQ^T += K^T dS^T
//
// A lane uses only numbers of its own query, and masked probabilities are exactly 0, so a query's result does not
// depend on which queries share its block.
//
// This file holds what both directions share: layouts, rows, and which keys a query sees.
#pragma once

#include <algorithm>

#include "gemm.hpp"

namespace {

typedef int32_t vi_mem __attribute__((vector_size(4 * W), aligned(4), may_alias));

// The operands of a product: the left one, [M, K], with strides; the right one, [K, N], in the layout of `Operands`.
template <class E>
struct Left {
    const E* at;
    i64 rs, cs;
};
template <class E>
struct Right {
    const E* at;
    i64 ld;
};

// --- layouts ---------------------------------------------------------------------------------------------------------

// How operands are made from rows. A row holds one token: its features, and zeros up to `row` elements.
template <class G>
struct Operands;

template <>
struct Operands<FloatGemm> {
    typedef float E;
    static constexpr i64 QUERIES = 32, KEYS = 48;  // per block
    static constexpr i64 STEP = 4;                 // products take keys in multiples of this
    static constexpr bool ROWS_SERVE = true;       // rows and scores serve as operands unchanged, on either side

    static i64 row(i64 n) { return round_up(n, W); }
    static i64 left_size(i64, i64) { return 0; }
    static i64 right_size(i64 K, i64 N) { return row(K) * row(N); }

    // [M, K] from K rows of M features.
    static Left<E> left_transposed(E*, const E* rows, i64 ld, i64, i64) { return {rows, 1, ld}; }
    // [K, N] from K rows of N features.
    static Right<E> right(E*, const E* rows, i64 ld, i64, i64) { return {rows, ld}; }
    // [K, N] from N rows of K features.
    static void right_transposed(E* to, const E* rows, i64 ld, i64 K, i64 N) {
        for (i64 n = 0; n < N; n += W)
            for (i64 k = 0; k < K; k += W) {
                vf block[W];
                for (int i = 0; i < W; ++i) block[i] = load(rows + (n + i) * ld + k);
                transpose(block);
                for (int i = 0; i < W; ++i) store(to + (k + i) * N + n, block[i]);
            }
    }
    // Writes two rows of a right operand with `QUERIES` columns and K rows.
    static INLINE void put_right(E* to, i64 K, i64 k, i64 n, vf p0, vf p1) {
        store(to + k * QUERIES + n, p0);
        store(to + (k + 1) * QUERIES + n, p1);
    }
    static void multiply(i64 M, i64 N, i64 K, Left<E> a, Right<E> b, float* c, i64 ldc, bool add) {
        FloatGemm::multiply_rows(M, N, K, a.at, a.rs, a.cs, b.at, b.ld, c, ldc, add);
    }
};

#if defined(BESSEMER_BF16)
template <>
struct Operands<Bf16Gemm> {
    typedef bf16 E;
    static constexpr i64 QUERIES = 64, KEYS = 64, STEP = 32;
    static constexpr bool ROWS_SERVE = false;

    static i64 row(i64 n) { return round_up(n, 32); }
    static i64 left_size(i64 M, i64 K) { return round_up(M, 32) * K; }
    static i64 right_size(i64 K, i64 N) { return row(K) * round_up(N, 32); }

    static Left<E> left_transposed(E* to, const E* rows, i64 ld, i64 M, i64 K) {
        for (i64 k = 0; k < K; k += 2 * W)
            for (i64 m = 0; m < M; m += W) {
                vf pair[W];
                for (int i = 0; i < W; ++i) pair[i] = paired(rows + (k + 2 * i) * ld + m, ld);
                transpose(pair);
                for (int i = 0; i < W; ++i) store((float*)(to + (m + i) * K + k), pair[i]);
            }
        return {to, K, 1};
    }
    static Right<E> right(E* to, const E* rows, i64 ld, i64 K, i64 N) {
        for (i64 n = 0; n < N; n += W)
            for (i64 k = 0; k < K; k += 2) store((float*)place(to, K, k, n), paired(rows + k * ld + n, ld));
        return {to, 0};
    }
    static void right_transposed(E* to, const E* rows, i64 ld, i64 K, i64 N) {
        for (i64 n = 0; n < N; n += W)
            for (i64 k = 0; k < row(K); k += 2 * W) {
                vf pair[W];
                for (int i = 0; i < W; ++i) pair[i] = load((const float*)(rows + (n + i) * ld + k));
                transpose(pair);
                for (int i = 0; i < W; ++i) store((float*)place(to, row(K), k + 2 * i, n), pair[i]);
            }
    }
    static INLINE void put_right(E* to, i64 K, i64 k, i64 n, vf p0, vf p1) {
        store((float*)place(to, K, k, n), (vf)(bf16_bits(p0) | bf16_bits(p1) << 16));
    }
    static void multiply(i64 M, i64 N, i64 K, Left<E> a, Right<E> b, float* c, i64 ldc, bool add) {
        Bf16Gemm::multiply(M, N, K, a.at, a.rs, b.at, c, ldc, add);
    }

   private:
    // Address of rows k and k + 1 of column n in a right operand of K rows; k is even.
    static INLINE E* place(E* to, i64 K, i64 k, i64 n) { return to + n / 16 * K * 16 + k * 16 + n % 16 * 2; }
    // W elements of this row and of the next one, interleaved.
    static INLINE vf paired(const E* p, i64 ld) {
        return (vf)(longer(*(const vh_mem*)p) | longer(*(const vh_mem*)(p + ld)) << 16);
    }
};
#endif

// --- rows ------------------------------------------------------------------------------------------------------------

template <int... J>
INLINE vf turned(vf x, vf table, vf sign, std::integer_sequence<int, J...>) {
    vf cosine = pick<(J / 2 * 2)...>(table, table), sine = pick<(J / 2 * 2 + 1)...>(table, table);
    return x * cosine + pick<(J ^ 1)...>(x, x) * (sine * sign);
}

// Pairs of x, multiplied as complex numbers by the table's, or if `back` their conjugates. No table: x times scale.
template <class E, class T>
INLINE void turn(E* to, const T* x, const float* table, i64 n, float scale, bool back) {
    vf sign;
    for (int i = 0; i < W; ++i) sign[i] = (i % 2 == 0) != back ? -1.0f : 1.0f;
    for (i64 d = 0; d < n; d += W) {
        int left = (int)least(W, n - d);
        bool whole = left == W;
        vf y = (whole ? load(x + d) : load_part(x + d, left)) * scale;
        if (table) {
            vf by = whole ? load(table + d) : load_part(table + d, left);
            y = turned(y, by, sign, std::make_integer_sequence<int, W>{});
        }
        if (whole)
            store(to + d, y);
        else
            store_part(to + d, y, left);
    }
}

// Rows of one head are a row of all heads apart, too far for the hardware prefetcher. AHEAD: rows to prefetch ahead.
constexpr i64 AHEAD = 16;
template <bool WRITE, class T>
INLINE void fetch(const T* p, i64 n) {
    for (i64 d = 0; d < n; d += 64 / sizeof(T)) __builtin_prefetch(p + d, WRITE, WRITE ? 3 : 2);
}

// n vectors of `width` features in rows of `ld`; the last `rope` features come from `pairs` and are rotated. Rows and
// columns beyond are zero.
template <class E, class T>
void pack_rows(E* to, i64 ld, i64 n, i64 rows, const T* plain, i64 stride, i64 width, const T* pairs, i64 pairs_stride,
               i64 rope, const float* table) {
    for (i64 t = 0; t < n; ++t) {
        E* row = to + t * ld;
        fetch<false>(plain + (t + AHEAD) * stride, width);
        turn(row, plain + t * stride, nullptr, width - rope, 1.0f, false);
        const float* by = table ? table + t * rope : nullptr;
        if (rope) turn(row + width - rope, pairs + t * pairs_stride, by, rope, 1.0f, false);
        if (ld > width) memset((void*)(row + width), 0, (ld - width) * sizeof(E));
    }
    memset((void*)(to + n * ld), 0, (rows - n) * ld * sizeof(E));
}

// N rows of M features in rows of M rounded up to W, from their transpose times one factor per row.
template <i64 N>
void transpose_out(float* to, const float* from, i64 M, const float* factor) {
    i64 ld = round_up(M, W);
    for (i64 n = 0; n < N; n += W)
        for (i64 m = 0; m < M; m += W) {
            vf block[W] = {};
            for (int i = 0; i < W && m + i < M; ++i) block[i] = load(from + (m + i) * N + n) * load(factor + n);
            transpose(block);
            for (int i = 0; i < W; ++i) store(to + (n + i) * ld + m, block[i]);
        }
}

template <class T>
float inner(const T* x, const T* y, i64 n) {
    vf total = {};
    i64 i = 0;
    for (; i + W <= n; i += W) total += load(x + i) * load(y + i);
    if (i < n) total += load_part(x + i, (int)(n - i)) * load_part(y + i, (int)(n - i));
    return sum(total);
}

// --- arguments of a call ---------------------------------------------------------------------------------------------

template <class T>
struct Call {
    const T *q, *kv, *k_rope;        // [B, queries, H, nope + rope], [B, keys, H, nope + value], [B, keys, rope]
    const float *q_table, *k_table;  // rotations [queries or keys, rope / 2, 2] of a row, or null
    i64 q_table_row, k_table_row;    // stride along the batch
    const int32_t* segments;         // [B, keys], or null
    i64 B, H, queries, keys, nope, rope, value;
    float scale;

    i64 width() const { return nope + rope; }
    i64 offset() const { return keys - queries; }  // query t is at position t + offset
    i64 q_at(i64 b, i64 t, i64 h) const { return ((b * queries + t) * H + h) * width(); }
    i64 kv_at(i64 b, i64 t, i64 h) const { return ((b * keys + t) * H + h) * (nope + value); }
    i64 out_at(i64 b, i64 t, i64 h) const { return ((b * queries + t) * H + h) * value; }
    const float* q_turn(i64 b, i64 t) const { return q_table ? q_table + b * q_table_row + t * rope : nullptr; }
    const float* k_turn(i64 b, i64 t) const { return k_table ? k_table + b * k_table_row + t * rope : nullptr; }

    template <class E>
    void pack_queries(E* to, i64 ld, i64 rows, i64 b, i64 h, i64 first, i64 n) const {
        const T* x = q + q_at(b, first, h);
        pack_rows(to, ld, n, rows, x, H * width(), width(), x + nope, H * width(), rope, q_turn(b, first));
    }
    template <class E>
    void pack_keys(E* to, i64 ld, i64 rows, i64 b, i64 h, i64 first, i64 n) const {
        const T *x = kv + kv_at(b, first, h), *pairs = k_rope + (b * keys + first) * rope;
        pack_rows(to, ld, n, rows, x, H * (nope + value), width(), pairs, rope, rope, k_turn(b, first));
    }
    template <class E>
    void pack_values(E* to, i64 ld, i64 rows, i64 b, i64 h, i64 first, i64 n) const {
        const T *x = kv + kv_at(b, first, h) + nope, *none = nullptr;
        pack_rows(to, ld, n, rows, x, H * (nope + value), value, none, 0, 0, nullptr);
    }
};

// Which keys of a block are visible to the queries of a block.
template <class G>
struct Mask {
    static constexpr i64 QUERIES = Operands<G>::QUERIES, KEYS = Operands<G>::KEYS;
    int32_t position[QUERIES], segment[QUERIES] = {}, key_segment[KEYS] = {};
    int32_t lowest, highest;  // segments of the queries
    i64 key;                  // the first key's position
    i64 first;                // keys from here on may be hidden from some query; a multiple of 4

    template <class T>
    void queries(const Call<T>& call, i64 b, i64 at, i64 n) {
        for (i64 q = 0; q < QUERIES; ++q) position[q] = (int32_t)(at + q);
        if (!call.segments) return;
        memcpy(segment, call.segments + b * call.keys + at, n * sizeof(int32_t));
        lowest = *std::min_element(segment, segment + n), highest = *std::max_element(segment, segment + n);
    }
    // False if no query sees any of the n keys from `at` on.
    template <class T>
    bool keys(const Call<T>& call, i64 b, i64 at, i64 n) {
        key = at;
        first = std::max<i64>(0, least(n, position[0] - at + 1)) / 4 * 4;
        if (!call.segments) return true;
        n = least(n, call.keys - at);
        memcpy(key_segment, call.segments + b * call.keys + at, n * sizeof(int32_t));
        int32_t low = *std::min_element(key_segment, key_segment + n);
        int32_t high = *std::max_element(key_segment, key_segment + n);
        if (low != highest || high != lowest) first = 0;
        return low <= highest && high >= lowest;
    }
    INLINE vi visible(i64 k, i64 q) const {
        vi at = *(const vi_mem*)(position + q), mine = *(const vi_mem*)(segment + q);
        return (vi)(at >= (int32_t)(key + k)) & (vi)(mine == key_segment[k]);
    }
};

// Renumbers segments 0, 1, 2... in the order of their numbers, so that they fit 32 bits.
void number(int32_t* to, const i64* from, i64 n) {
    if (std::is_sorted(from, from + n)) {
        to[0] = 0;
        for (i64 t = 1; t < n; ++t) to[t] = to[t - 1] + (from[t] != from[t - 1]);
        return;
    }
    i64* known = scratch<10, i64>(n);
    std::copy(from, from + n, known);
    std::sort(known, known + n);
    i64* end = std::unique(known, known + n);
    for (i64 t = 0; t < n; ++t) to[t] = (int32_t)(std::lower_bound(known, end, from[t]) - known);
}

constexpr float LOWEST = -3e38f;  // below any score, and finite, so that -inf is never subtracted from -inf
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

#if defined(BESSEMER_BF16)
template <class T>
struct Best {
    typedef FloatGemm Gemm;
};
template <>
struct Best<bf16> {
    typedef Bf16Gemm Gemm;
};
#else
template <class T>
struct Best {
    typedef FloatGemm Gemm;
};
#endif

// Writes segments [B, keys], as numbered by the user, to `numbers`, which the call reads.
template <class T>
void number_all(const Call<T>& call, const i64* segments, int32_t* numbers, int threads) {
    i64 n = call.keys;
    if (segments) parallel(call.B, threads, [&](i64 b) { number(numbers + b * n, segments + b * n, n); });
}

}  // namespace
