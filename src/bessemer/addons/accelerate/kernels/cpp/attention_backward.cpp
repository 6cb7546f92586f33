// The softmax core of multi-head latent attention, backward (`attention.hpp`).
#include "attention.hpp"

namespace {

// P^T and dS^T of a block of n keys, computed from the scores and dP^T.
template <class G>
void softmax_backward(const float* s, const float* dp, typename Operands<G>::E* p, typename Operands<G>::E* ds,
                      typename Operands<G>::E* ds_right, i64 n, const Mask<G>& mask, float scale, const float* high,
                      const float* delta) {
    typedef Operands<G> O;
    for (i64 q = 0; q < O::QUERIES; q += W) {
        vf most = load(high + q), mean = load(delta + q);
        for (i64 i = 0; i < n; i += 2) {
            vf x[2], d[2];
#pragma GCC unroll 2
            for (int u = 0; u < 2; ++u) {
                i64 at = (i + u) * O::QUERIES + q;
                x[u] = vexp2(load(s + at) * scale - most);
                d[u] = x[u] * (load(dp + at) - mean);
                if (i >= mask.first) {
                    vi visible = mask.visible(i + u, q);
                    x[u] = (vf)(visible & (vi)x[u]), d[u] = (vf)(visible & (vi)d[u]);
                }
                store(p + at, x[u]);
                store(ds + at, d[u]);
            }
            if (!O::ROWS_SERVE) O::put_right(ds_right, n, i, q, d[0], d[1]);
        }
    }
}

template <class T>
struct Gradients {
    const T *dout, *out;
    const float* lse;
    T *dq, *dkv;
    float* dk_rope;  // [B, H, keys, rope]: per head, after the rotation
};

template <class G, class T>
__attribute__((noinline)) void backward(const Call<T>& call, const Gradients<T>& grad, i64 b, i64 h) {
    typedef Operands<G> O;
    typedef typename O::E E;
    constexpr i64 QUERIES = O::QUERIES, KEYS = O::KEYS;
    typename G::Session session;
    i64 width = call.width(), nope = call.nope, rope = call.rope, value = call.value, length = call.keys;
    i64 blocks = (length + QUERIES - 1) / QUERIES, S = blocks * QUERIES, kw = O::row(width), vw = O::row(value);

    // For every block of queries: q and dO as right operands in both orientations.
    i64 qt_size = O::right_size(width, QUERIES), gt_size = O::right_size(value, QUERIES);
    i64 q_size = O::ROWS_SERVE ? QUERIES * kw : O::right_size(QUERIES, width);
    i64 g_size = O::ROWS_SERVE ? QUERIES * vw : O::right_size(QUERIES, value);
    E* q = scratch<20, E>(blocks * q_size);
    E* g = scratch<21, E>(blocks * g_size);
    E* qt = scratch<22, E>(blocks * qt_size);
    E* gt = scratch<23, E>(blocks * gt_size);
    float* high = scratch<24, float>(S);  // log-sum-exp, base 2
    float* delta = scratch<25, float>(S);
    float* dqt = scratch<26, float>(blocks * width * QUERIES);
    memset(dqt, 0, blocks * width * QUERIES * sizeof(float));
    E* rows = scratch<27, E>(QUERIES * std::max(kw, vw));
    for (i64 block = 0; block < blocks; ++block) {
        i64 t = block * QUERIES, n = least(QUERIES, length - t);
        E* q_rows = O::ROWS_SERVE ? q + block * q_size : rows;
        call.pack_queries(q_rows, kw, QUERIES, b, h, t, n);
        O::right(q + block * q_size, q_rows, kw, QUERIES, width);
        O::right_transposed(qt + block * qt_size, q_rows, kw, width, QUERIES);
        E* g_rows = O::ROWS_SERVE ? g + block * g_size : rows;
        const T *dout = grad.dout + call.out_at(b, t, h), *out = grad.out + call.out_at(b, t, h);
        pack_rows(g_rows, vw, n, QUERIES, dout, call.H * value, value, (const T*)nullptr, 0, 0, nullptr);
        O::right(g + block * g_size, g_rows, vw, QUERIES, value);
        O::right_transposed(gt + block * gt_size, g_rows, vw, value, QUERIES);
        for (i64 i = 0; i < QUERIES; ++i) {
            fetch<false>(out + (i + AHEAD) * call.H * value, value);
            high[t + i] = i < n ? grad.lse[(b * call.H + h) * length + t + i] * LOG2E : 0.0f;
            delta[t + i] = i < n ? inner(dout + i * call.H * value, out + i * call.H * value, value) : 0.0f;
        }
    }

    i64 k_ld = round_up(width, 16), v_ld = round_up(value, 16);
    E* k = scratch<28, E>(KEYS * kw);
    E* v = scratch<29, E>(KEYS * vw);
    E* kt = scratch<30, E>(O::left_size(width, KEYS));
    float* dk = scratch<31, float>(KEYS * k_ld);
    float* dv = scratch<32, float>(KEYS * v_ld);
    float* s = scratch<33, float>(KEYS * QUERIES);
    float* dp = scratch<34, float>(KEYS * QUERIES);
    E* p = O::ROWS_SERVE ? (E*)s : scratch<35, E>(KEYS * QUERIES);
    E* ds = O::ROWS_SERVE ? (E*)dp : scratch<36, E>(KEYS * QUERIES);
    E* ds_right = O::ROWS_SERVE ? (E*)dp : scratch<37, E>(KEYS * QUERIES);
    Mask<G> mask;
    for (i64 at = 0; at < length; at += KEYS) {
        i64 n = least(KEYS, length - at);
        call.pack_keys(k, kw, KEYS, b, h, at, n);
        call.pack_values(v, vw, KEYS, b, h, at, n);
        Left<E> k_transposed = O::left_transposed(kt, k, kw, width, KEYS);
        memset(dk, 0, KEYS * k_ld * sizeof(float));
        memset(dv, 0, KEYS * v_ld * sizeof(float));
        for (i64 i = 0; i < n; ++i) fetch<true>(grad.dkv + call.kv_at(b, at + i, h), nope + value);
        for (i64 block = at / QUERIES; block < blocks; ++block) {
            i64 t = block * QUERIES, seen = round_up(least(n, t + QUERIES - at), O::STEP);
            mask.queries(call, b, t, least(QUERIES, length - t));
            if (!mask.keys(call, b, at, seen)) continue;
            O::multiply(seen, QUERIES, width, {k, kw, 1}, {qt + block * qt_size, QUERIES}, s, QUERIES, false);
            O::multiply(seen, QUERIES, value, {v, vw, 1}, {gt + block * gt_size, QUERIES}, dp, QUERIES, false);
            softmax_backward<G>(s, dp, p, ds, ds_right, seen, mask, call.scale * LOG2E, high + t, delta + t);
            O::multiply(seen, value, QUERIES, {p, QUERIES, 1}, {g + block * g_size, vw}, dv, v_ld, true);
            O::multiply(seen, width, QUERIES, {ds, QUERIES, 1}, {q + block * q_size, kw}, dk, k_ld, true);
            O::multiply(width, QUERIES, seen, k_transposed, {ds_right, QUERIES}, dqt + t * width, QUERIES, true);
        }
        for (i64 i = 0; i < n; ++i) {
            T* to = grad.dkv + call.kv_at(b, at + i, h);
            turn(to, dk + i * k_ld, nullptr, nope, call.scale, false);
            turn(to + nope, dv + i * v_ld, nullptr, value, 1.0f, false);
            float* turned = grad.dk_rope + ((b * call.H + h) * length + at + i) * rope;
            turn(turned, dk + i * k_ld + nope, nullptr, rope, call.scale, false);
        }
    }
    float factor[QUERIES];
    for (float& x : factor) x = call.scale;
    float* dq_rows = scratch<38, float>(round_up(width, W) * QUERIES);
    for (i64 t = 0; t < length; t += QUERIES) {
        transpose_out<QUERIES>(dq_rows, dqt + t * width, width, factor);
        for (i64 i = 0; i < least(QUERIES, length - t); ++i) {
            T* to = grad.dq + call.q_at(b, t + i, h);
            fetch<true>(to + AHEAD * call.H * width, width);
            const float* from = dq_rows + i * round_up(width, W);
            turn(to, from, nullptr, nope, 1.0f, false);
            turn(to + nope, from + nope, call.q_turn(b, t + i), rope, 1.0f, true);
        }
    }
}

// The gradient of the shared rotary key: summed over heads in their order, and rotated back.
template <class T>
__attribute__((noinline)) void sum_heads(const Call<T>& call, const float* of_heads, T* dk_rope, i64 b, i64 t) {
    i64 rope = call.rope, from_head = call.keys * rope;
    const float* from = of_heads + (b * call.H * call.keys + t) * rope;
    float* total = scratch<39, float>(rope);
    memcpy(total, from, rope * sizeof(float));
    for (i64 h = 1; h < call.H; ++h)
        for (i64 d = 0; d < rope; ++d) total[d] += from[h * from_head + d];
    turn(dk_rope + (b * call.keys + t) * rope, total, call.k_turn(b, t), rope, 1.0f, true);
}

}  // namespace

#define FUNCTION(T, suffix)                                                                                        \
    extern "C" EXPORT void attention_backward_##suffix(                                                            \
        const T* dout, const T* q, const T* kv, const T* k_rope, const float* table, i64 table_row,                \
        const i64* segments, int32_t* numbers, const T* out, const float* lse, T* dq, T* dkv, float* of_heads,     \
        T* dk_rope, i64 B, i64 H, i64 length, i64 nope, i64 rope, i64 value, float scale, i64 threads) {           \
        Call<T> call{q, kv, k_rope, table, table, table_row, table_row, segments ? numbers : nullptr,              \
                     B, H, length, length, nope, rope, value, scale};                                              \
        Gradients<T> grad{dout, out, lse, dq, dkv, of_heads};                                                      \
        number_all(call, segments, numbers, (int)threads);                                                         \
        parallel(B * H, (int)threads, [&](i64 i) {                                                                 \
            NoDenormals guard;                                                                                     \
            backward<Best<T>::Gemm>(call, grad, i / H, i % H);                                                     \
        });                                                                                                        \
        i64 T_ = length;                                                                                           \
        parallel(B * T_, (int)threads, [&](i64 i) {                                                                \
            NoDenormals guard;                                                                                     \
            sum_heads(call, of_heads, dk_rope, i / T_, i % T_);                                                    \
        });                                                                                                        \
    }
FUNCTION(float, float32)
FUNCTION(bf16, bfloat16)
