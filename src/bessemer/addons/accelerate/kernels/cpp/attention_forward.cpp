// The softmax core of multi-head latent attention, forward (`attention.hpp`).
#include "attention.hpp"

namespace {

// Unnormalised probabilities of a block of n keys from the scores, which may be overwritten. Every query has a running
// maximum and sum; `factor` rescales what was summed before.
template <class G>
void softmax(float* s, typename Operands<G>::E* p, i64 n, const Mask<G>& mask, float scale, float* high, float* total,
             float* factor) {
    typedef Operands<G> O;
    const vf hidden = splat(-std::numeric_limits<float>::infinity());
    for (i64 q = 0; q < O::QUERIES; q += W) {
        float* column = s + q;
        vf most[4] = {hidden, hidden, hidden, hidden}, sums[4] = {};
        i64 i = 0;
        for (; i < mask.first; i += 4)
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) most[u] = vmax(most[u], load(column + (i + u) * O::QUERIES));
        for (; i < n; i += 4)
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) {
                float* at = column + (i + u) * O::QUERIES;
                vf x = select(mask.visible(i + u, q), load(at), hidden);
                store(at, x);
                most[u] = vmax(most[u], x);
            }
        vf before = load(high + q);
        vf now = vmax(vmax(vmax(most[0], most[1]), vmax(most[2], most[3])) * scale, before);
        for (i = 0; i < n; i += 4) {
            vf x[4];
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) {
                x[u] = vexp2(load(column + (i + u) * O::QUERIES) * scale - now);
                sums[u] += x[u];
            }
            O::put_right(p, n, i, q, x[0], x[1]);
            O::put_right(p, n, i + 2, q, x[2], x[3]);
        }
        vf by = vexp2(before - now);
        store(high + q, now);
        store(factor + q, by);
        store(total + q, load(total + q) * by + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
    }
}

// out [B, queries, H, value] and lse [B * H, queries] of one head.
template <class G, class T>
__attribute__((noinline)) void forward(const Call<T>& call, T* out, float* lse, i64 b, i64 h) {
    typedef Operands<G> O;
    typedef typename O::E E;
    constexpr i64 QUERIES = O::QUERIES, KEYS = O::KEYS;
    typename G::Session session;
    i64 width = call.width(), value = call.value, S = round_up(call.keys, KEYS);
    i64 kw = O::row(width), vw = O::row(value), v_size = O::left_size(value, KEYS);
    E* k = scratch<10, E>(S * kw);
    E* v = scratch<11, E>(S * vw);
    call.pack_keys(k, kw, S, b, h, 0, call.keys);
    call.pack_values(v, vw, S, b, h, 0, call.keys);
    E* vt = scratch<12, E>(S / KEYS * v_size);
    for (i64 at = 0; at < S; at += KEYS) O::left_transposed(vt + at / KEYS * v_size, v + at * vw, vw, value, KEYS);

    E* rows = scratch<13, E>(QUERIES * kw);
    E* qt = scratch<14, E>(O::right_size(width, QUERIES));
    float* s = scratch<15, float>(KEYS * QUERIES);
    E* p = O::ROWS_SERVE ? (E*)s : scratch<16, E>(KEYS * QUERIES);
    float* o = scratch<17, float>(value * QUERIES);
    float* o_rows = scratch<18, float>(round_up(value, W) * QUERIES);
    Mask<G> mask;
    alignas(64) float high[QUERIES], total[QUERIES], factor[QUERIES];
    for (i64 t = 0; t < call.queries; t += QUERIES) {
        i64 n = least(QUERIES, call.queries - t), end = t + call.offset() + n;
        call.pack_queries(rows, kw, QUERIES, b, h, t, n);
        O::right_transposed(qt, rows, kw, width, QUERIES);
        mask.queries(call, b, t + call.offset(), n);
        for (i64 q = 0; q < QUERIES; ++q) high[q] = LOWEST, total[q] = 0;
        memset(o, 0, value * QUERIES * sizeof(float));
        for (i64 q = 0; q < n; ++q) fetch<true>(out + call.out_at(b, t + q, h), value);
        for (i64 at = 0; at < end; at += KEYS) {
            i64 seen = round_up(least(KEYS, end - at), O::STEP);
            if (!mask.keys(call, b, at, seen)) continue;
            O::multiply(seen, QUERIES, width, {k + at * kw, kw, 1}, {qt, QUERIES}, s, QUERIES, false);
            softmax<G>(s, p, seen, mask, call.scale * LOG2E, high, total, factor);
            for (i64 i = 0; i < value * QUERIES; i += W) store(o + i, load(o + i) * load(factor + i % QUERIES));
            Left<E> left = O::ROWS_SERVE ? Left<E>{v + at * vw, 1, vw} : Left<E>{vt + at / KEYS * v_size, KEYS, 1};
            O::multiply(value, QUERIES, seen, left, {p, QUERIES}, o, QUERIES, true);
        }
        for (i64 q = 0; q < QUERIES; ++q) factor[q] = 1.0f / total[q];
        transpose_out<QUERIES>(o_rows, o, value, factor);
        for (i64 q = 0; q < n; ++q) {
            turn(out + call.out_at(b, t + q, h), o_rows + q * round_up(value, W), nullptr, value, 1.0f, false);
            lse[(b * call.H + h) * call.queries + t + q] = (high[q] + __builtin_log2f(total[q])) * LN2;
        }
    }
}

}  // namespace

#define FUNCTION(T, suffix)                                                                                        \
    extern "C" EXPORT void attention_##suffix(                                                                     \
        const T* q, const T* kv, const T* k_rope, const float* q_table, i64 q_table_row, const float* k_table,     \
        i64 k_table_row, const i64* segments, int32_t* numbers, T* out, float* lse, i64 B, i64 H, i64 queries,     \
        i64 keys, i64 nope, i64 rope, i64 value, float scale, i64 threads) {                                       \
        Call<T> call{q, kv, k_rope, q_table, k_table, q_table_row, k_table_row, segments ? numbers : nullptr,      \
                     B, H, queries, keys, nope, rope, value, scale};                                               \
        number_all(call, segments, numbers, (int)threads);                                                         \
        parallel(B * H, (int)threads, [&](i64 i) {                                                                 \
            NoDenormals guard;                                                                                     \
            forward<Best<T>::Gemm>(call, out, lse, i / H, i % H);                                                  \
        });                                                                                                        \
    }
FUNCTION(float, float32)
FUNCTION(bf16, bfloat16)
