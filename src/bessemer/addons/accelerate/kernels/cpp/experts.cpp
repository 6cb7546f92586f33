// SwiGLU of the routed experts with dispatch and combine: y_n = sum over its K experts of g W2 (silu(W1 x_n) * W3 x_n).
//
// Rows are routed tokens in expert order. They are gathered a block at a time into the layout of the products and never
// stored as [M, D]; the activation and the gate g are applied between the two products; results are added to their
// token in float32, in ascending order of experts. With one choice per token and no order, the same code serves rows
// already in expert order; with one expert, a dense FFN.
//
// Shapes: N tokens, K choices, M = N K rows, D hidden, E experts, F inner width; w13 [E, 2F, D] (gate rows, then up
// rows), w2 [E, D, F]. T is the dtype in memory; as a template parameter, E is the operands' element type.
#include "gemm.hpp"

namespace {

template <class G>
constexpr i64 BLOCK = sizeof(typename G::Element) == 2 ? 256 : 96;  // rows per product
constexpr i64 CHUNK = 1024;  // rows of an expert whose weight gradient one task sums

// Which row is which token. Rows of an expert are in the order of their tokens.
struct Rows {
    const i64* start;  // [E + 1]: the rows of expert e are start[e], ..., start[e + 1] - 1
    const i64* order;  // [M]: n K + k of each row; null: row m is m
    const float* gate;  // indexed by n K + k; null: 1
    i64 K;

    i64 place(i64 m) const { return order ? order[m] : m; }
    i64 token(i64 m) const { return order ? order[m] / K : m; }
    float g(i64 m) const { return gate ? gate[place(m)] : 1.0f; }
    // The first row of an expert whose token is at least n.
    i64 from(i64 e, i64 n) const {
        i64 low = start[e], high = start[e + 1];
        while (low < high) {
            i64 middle = (low + high) / 2;
            if (token(middle) < n)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }
};

struct Sizes {
    i64 N, D, E, F;
};

const i64* starts(const i64* count, i64 E) {
    i64* start = scratch<0, i64>(E + 1);
    start[0] = 0;
    for (i64 e = 0; e < E; ++e) start[e + 1] = start[e] + count[e];
    return start;
}

// --- rows as operands ------------------------------------------------------------------------------------------------

// Writes a row of n elements as a row of an A operand, padded with zeros.
template <class G, class T>
INLINE void put_row(typename G::Element* to, const T* from, i64 n) {
    i64 i = 0;
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    if (i < n) store_part(to + i, load_part(from + i, (int)(n - i)), (int)(n - i));
    for (i = n; i < G::a_width(n); ++i) put(to + i, 0.0f);
}
// Gathered rows may be anywhere, so the hardware prefetcher does not find the next one.
template <class T>
INLINE void fetch_row(const T* p, i64 n) {
    for (i64 i = 0; i < n; i += 64 / (i64)sizeof(T)) __builtin_prefetch(p + i);
}
constexpr i64 AHEAD = 4;

template <class G, class T, class Row>
INLINE void put_rows(typename G::Element* to, i64 rows, i64 n, Row row) {
    for (i64 r = 0; r < rows; ++r) {
        if (r + AHEAD < rows) fetch_row(row(r + AHEAD), n);
        put_row<G>(to + r * G::a_width(n), row(r), n);
    }
}
// n < W lanes of a vector as an operand stored as T: BF16 is rounded even if products are float32.
template <class T, class E>
INLINE void put_rounded(E* to, T* also, vf x, int n) {
    if (sizeof(T) < sizeof(E)) {
        T some[W];
        store(some, x);
        x = load(some);
    }
    if (n >= W) {
        store(to, x);
        if (also) store(also, x);
    } else {
        store_part(to, x, n);
        if (also) store_part(also, x, n);
    }
}
__attribute__((noinline)) void add_row(float* to, const float* row, i64 D) {
    i64 d = 0;
    for (; d + W <= D; d += W) store(to + d, load(to + d) + load(row + d));
    for (; d < D; ++d) to[d] += row[d];
}
// Adds every row of `from` to the row of its token.
INLINE void add_rows(float* sum, const float* from, const Rows& rows, i64 m, i64 n, i64 D) {
    for (i64 r = 0; r < n; ++r) {
        if (r + AHEAD < n) fetch_row(sum + rows.token(m + r + AHEAD) * D, D);
        add_row(sum + rows.token(m + r) * D, from + r * D, D);
    }
}
// Moves float32 sums of tokens to their destination, unless they are already there.
template <class T>
__attribute__((noinline)) void narrow_rows(T* to, const float* from, i64 n) {
    if ((const void*)to == (const void*)from) return;
    i64 i = 0;
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    for (; i < n; ++i) put(to + i, from[i]);
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <class G, class T>
struct Forward {
    typedef typename G::Element E;
    Rows rows;
    Sizes s;
    const T *x, *w13, *w2;
    i64 ldx;
    T* y;
    T* h;  // [M, 2F] for backward, or null
    float* sum;  // [N, D]

    i64 size13() const { return G::b_size(s.D, 2 * s.F); }
    i64 size2() const { return G::b_size(s.F, s.D); }
    void pack(i64 e, E* to) const {
        G::pack_b(to, w13 + e * 2 * s.F * s.D, s.D, 2 * s.F, 1, s.D);
        G::pack_b(to + size13(), w2 + e * s.D * s.F, s.F, s.D, 1, s.F);
    }

    void run(int threads) {
        sum = sizeof(T) == 4 ? (float*)y : scratch<0, float>(s.N * s.D);
        // The number of ranges does not change the bits: a row's result does not depend on other rows.
        i64 ranges = threads <= 1 ? 1 : threads, size = size13() + size2();
        E* packed = nullptr;
        if (ranges > 1) {
            packed = scratch<1, E>(s.E * size);
            parallel(s.E, threads, [&](i64 e) { pack(e, packed + e * size); });
        }
        parallel(ranges, threads, [&](i64 range) {
            typename G::Session session;
            i64 first = s.N * range / ranges, last = s.N * (range + 1) / ranges;
            memset(sum + first * s.D, 0, (last - first) * s.D * sizeof(float));
            E* mine = packed ? nullptr : scratch<2, E>(size);
            for (i64 e = 0; e < s.E; ++e) {
                i64 low = rows.from(e, first), high = rows.from(e, last);
                if (low == high) continue;
                if (mine) pack(e, mine);
                const E* weights = mine ? mine : packed + e * size;
                for (i64 m = low; m < high; m += BLOCK<G>) block(m, least(BLOCK<G>, high - m), weights);
            }
            narrow_rows(y + first * s.D, sum + first * s.D, (last - first) * s.D);
        });
    }

    void block(i64 m, i64 n, const E* weights) const {
        i64 D = s.D, F = s.F, width = G::a_width(F), most = G::a_rows(BLOCK<G>);
        E* in = scratch<3, E>(most * G::a_width(D));
        E* act = scratch<4, E>(most * width);
        float* inner = scratch<5, float>(most * 2 * F + W);
        float* out = scratch<6, float>(most * D);
        put_rows<G, T>(in, n, D, [&](i64 r) { return x + rows.token(m + r) * ldx; });
        G::multiply(n, 2 * F, D, G::left(in, G::a_width(D)), weights, inner, 2 * F, false);
        for (i64 r = 0; r < n; ++r) {
            const float *gate = inner + r * 2 * F, *up = gate + F;
            E* to = act + r * width;
            if (h) narrow_rows(h + (m + r) * 2 * F, gate, 2 * F);
            vf g = splat(rows.g(m + r));
            for (i64 f = 0; f < F; f += W) {
                vf a = load(gate + f);
                put_rounded<T>(to + f, (T*)nullptr, a * vsigmoid(a) * load(up + f) * g, (int)least(W, F - f));
            }
            for (i64 f = F; f < width; ++f) put(to + f, 0.0f);
        }
        G::multiply(n, D, F, G::left(act, width), weights + size13(), out, D, false);
        add_rows(sum, out, rows, m, n, D);
    }
};

// --- backward --------------------------------------------------------------------------------------------------------

// The results a caller wants and the buffers it provides; null: none.
template <class T>
struct Gradients {
    T* dx;  // [N, D]
    float* dgate;  // by n K + k
    void *dw13, *dw2;  // float32 if `wide`, else T
    bool wide, add;  // add: to the existing content
    T *act, *dh;  // [M, F] and [M, 2F], the operands of weight gradients: written, or read if `ready`
    bool ready;
};

template <class G, class T>
struct Backward {
    typedef typename G::Element E;
    Rows rows;
    Sizes s;
    const T *dy, *x, *w13, *w2, *h;
    i64 ldx;
    Gradients<T> out;
    float* sum;  // [N, D] of dx

    struct Chunk {
        i64 e, first, last, part;  // part: its index in `parts`, -1 if it covers the whole expert
    };
    i64 size2() const { return G::b_size(s.D, s.F); }
    i64 size13() const { return G::b_size(2 * s.F, s.D); }
    i64 weights() const { return 3 * s.D * s.F; }
    bool wanted() const { return out.dw13 || out.dw2; }
    void pack2(i64 e, E* to) const { G::pack_b(to, w2 + e * s.D * s.F, s.D, s.F, s.F, 1); }
    void pack13(i64 e, E* to) const { G::pack_b(to, w13 + e * 2 * s.F * s.D, 2 * s.F, s.D, s.D, 1); }

    void run(int threads) {
        // Tokens of a range need dh of all experts; a single thread needs no copy of it.
        bool apart = out.dx && out.dh && threads > 1;
        if (out.dx) sum = sizeof(T) == 4 ? (float*)out.dx : scratch<0, float>(s.N * s.D);
        if (out.dx && !apart) memset(sum, 0, s.N * s.D * sizeof(float));
        E* packed = nullptr;
        if (apart) {
            packed = scratch<1, E>(s.E * size13());
            parallel(s.E, threads, [&](i64 e) { pack13(e, packed + e * size13()); });
        }
        i64 n = 0, n_parts = 0;
        Chunk* chunks = scratch<2, Chunk>(s.E + rows.start[s.E] / CHUNK + 1);
        for (i64 e = 0; e < s.E; ++e) {
            i64 first = rows.start[e], last = rows.start[e + 1];
            for (i64 m = first; m == first || m < last; m += CHUNK)
                chunks[n++] = {e, m, least(last, m + CHUNK), last - first > CHUNK ? n_parts++ : -1};
        }
        float* parts = scratch<3, float>(wanted() ? n_parts * weights() : 0);
        parallel(n, out.dx && !apart ? 1 : threads, [&](i64 i) { chunk(chunks[i], parts, !apart); });
        if (wanted() && n_parts)
            parallel(s.E, threads, [&](i64 e) {
                float* total = nullptr;
                for (i64 i = 0; i < n; ++i)
                    if (chunks[i].e == e && chunks[i].part >= 0) {
                        float* part = parts + chunks[i].part * weights();
                        if (total)
                            add_row(total, part, weights());
                        else
                            total = part;
                    }
                if (total) hand_over(e, total);
            });
        if (out.dx) {
            i64 ranges = apart ? threads : 1;
            parallel(ranges, threads, [&](i64 range) {
                i64 first = s.N * range / ranges, last = s.N * (range + 1) / ranges;
                if (apart) input(first, last, packed);
                narrow_rows(out.dx + first * s.D, sum + first * s.D, (last - first) * s.D);
            });
        }
    }

    // dx of a range of tokens from dh.
    void input(i64 first, i64 last, const E* packed) const {
        typename G::Session session;
        i64 width = G::a_width(2 * s.F);
        E* dh = scratch<4, E>(G::a_rows(BLOCK<G>) * width);
        memset(sum + first * s.D, 0, (last - first) * s.D * sizeof(float));
        for (i64 e = 0; e < s.E; ++e) {
            i64 high = rows.from(e, last);
            for (i64 m = rows.from(e, first); m < high; m += BLOCK<G>) {
                i64 n = least(BLOCK<G>, high - m);
                put_rows<G, T>(dh, n, 2 * s.F, [&](i64 r) { return out.dh + (m + r) * 2 * s.F; });
                add_input(m, n, dh, packed + e * size13());
            }
        }
    }
    void add_input(i64 m, i64 n, const E* dh, const E* packed13) const {
        float* dx = scratch<5, float>(G::a_rows(BLOCK<G>) * s.D);
        G::multiply(n, s.D, 2 * s.F, G::left(dh, G::a_width(2 * s.F)), packed13, dx, s.D, false);
        add_rows(sum, dx, rows, m, n, s.D);
    }

    void chunk(const Chunk& c, float* parts, bool with_input) const {
        typename G::Session session;
        i64 D = s.D, F = s.F, most = G::a_rows(BLOCK<G>), widthD = G::a_width(D), widthF = G::a_width(F), widthH = G::a_width(2 * F);
        float* total = c.part >= 0 ? parts + c.part * weights() : scratch<6, float>(wanted() ? weights() : 0);
        E *grad = scratch<7, E>(most * widthD), *act = scratch<8, E>(most * widthF), *dh = scratch<9, E>(most * widthH);
        E *packed2 = scratch<10, E>(size2()), *packed13 = scratch<11, E>(size13());
        if (!out.ready && c.first < c.last) pack2(c.e, packed2);
        if (out.dx && with_input && c.first < c.last) pack13(c.e, packed13);
        for (i64 m = c.first; m < c.last; m += BLOCK<G>) {
            i64 n = least(BLOCK<G>, c.last - m);
            if (!out.ready || out.dw2) put_rows<G, T>(grad, n, D, [&](i64 r) { return dy + rows.token(m + r) * D; });
            if (out.ready) {
                if (out.dw2) put_rows<G, T>(act, n, F, [&](i64 r) { return out.act + (m + r) * F; });
                if (out.dw13) put_rows<G, T>(dh, n, 2 * F, [&](i64 r) { return out.dh + (m + r) * 2 * F; });
            } else {
                float* dact = scratch<12, float>(most * F + W);
                G::multiply(n, F, D, G::left(grad, widthD), packed2, dact, F, false);
                for (i64 r = 0; r < n; ++r) {
                    if (r + AHEAD < n) fetch_row(h + (m + r + AHEAD) * 2 * F, 2 * F);
                    activation(m + r, dact + r * F, act + r * widthF, dh + r * widthH);
                }
            }
            E* room = scratch<13, E>(G::a_rows(D > 2 * F ? D : 2 * F) * G::a_width(BLOCK<G>));
            E* right = scratch<14, E>(G::b_size(BLOCK<G>, D > F ? D : F));
            bool add = m > c.first;
            if (out.dw13) {
                G::pack_b_rows(right, n, D, [&](i64 r) {
                    if (r + AHEAD < n) fetch_row(x + rows.token(m + r + AHEAD) * ldx, D);
                    return x + rows.token(m + r) * ldx;
                });
                G::multiply(2 * F, D, n, G::left_transposed(room, dh, 2 * F, n, widthH), right, total, D, add);
            }
            if (out.dw2) {
                G::pack_b_rows(right, n, F, [&](i64 r) { return act + r * widthF; });
                float* d2 = total + 2 * F * D;
                G::multiply(D, F, n, G::left_transposed(room, grad, D, n, widthD), right, d2, F, add);
            }
            if (out.dx && with_input) add_input(m, n, dh, packed13);
        }
        if (wanted() && c.first == c.last) memset(total, 0, weights() * sizeof(float));
        if (wanted() && c.part < 0) hand_over(c.e, total);
    }

    // One row: from the gradient of the activation (times the gate) to act, dh and the gradient of the gate.
    INLINE void activation(i64 m, const float* dact, E* act, E* dh) const {
        i64 F = s.F;
        const T *gate = h + m * 2 * F, *up = gate + F;
        T *also_act = out.act ? out.act + m * F : nullptr, *also_dh = out.dh ? out.dh + m * 2 * F : nullptr;
        vf g = splat(rows.g(m)), inner = {};
        for (i64 f = 0; f < F; f += W) {
            int left = (int)least(W, F - f);
            vf a = left == W ? load(gate + f) : load_part(gate + f, left);
            vf b = left == W ? load(up + f) : load_part(up + f, left);
            vf d = left == W ? load(dact + f) : load_part(dact + f, left);
            vf sig = vsigmoid(a), silu = a * sig, product = silu * b;
            inner += d * product;
            d *= g;
            // d silu(a) = sig (1 + a (1 - sig)) = sig + silu (1 - sig)
            put_rounded<T>(act + f, also_act ? also_act + f : nullptr, product * g, left);
            put_rounded<T>(dh + f, also_dh ? also_dh + f : nullptr, d * b * (sig + silu * (1.0f - sig)), left);
            put_rounded<T>(dh + F + f, also_dh ? also_dh + F + f : nullptr, d * silu, left);
        }
        for (i64 f = F; f < G::a_width(F); ++f) put(act + f, 0.0f);
        for (i64 f = 2 * F; f < G::a_width(2 * F); ++f) put(dh + f, 0.0f);
        if (out.dgate) out.dgate[rows.place(m)] = sum_of(inner);
    }
    static INLINE float sum_of(vf x) { return ::sum(x); }

    // Writes the sum of an expert's weight gradient to its destination.
    __attribute__((noinline)) void hand_over(i64 e, const float* total) const {
        i64 n13 = 2 * s.F * s.D, n2 = s.F * s.D;
        if (out.wide) {
            give((float*)out.dw13, e, total, n13);
            give((float*)out.dw2, e, total + n13, n2);
        } else {
            give((T*)out.dw13, e, total, n13);
            give((T*)out.dw2, e, total + n13, n2);
        }
    }
    template <class U>
    __attribute__((noinline)) void give(U* to, i64 e, const float* from, i64 n) const {
        if (!to) return;
        to += e * n;
        i64 i = 0;
        for (; i + W <= n; i += W) store(to + i, out.add ? load(to + i) + load(from + i) : load(from + i));
        for (; i < n; ++i) put(to + i, out.add ? widen(to[i]) + from[i] : from[i]);
    }
};

template <class T>
struct Products {
    typedef FloatGemm Gemm;
};
#if defined(BESSEMER_BF16)
template <>
struct Products<bf16> {
    typedef Bf16Gemm Gemm;
};
#endif

}  // namespace

// Sorts M choices by expert, ties in order, and counts those of each expert. Invalid choices are left out.
extern "C" EXPORT void experts_order(const i64* expert, i64 M, i64 E, i64* count, i64* order) {
    memset(count, 0, E * sizeof(i64));
    for (i64 m = 0; m < M; ++m)
        if (expert[m] >= 0 && expert[m] < E) ++count[expert[m]];
    i64 *next = scratch<0, i64>(E), total = 0;
    for (i64 e = 0; e < E; total += count[e++]) next[e] = total;
    for (i64 m = 0; m < M; ++m)
        if (expert[m] >= 0 && expert[m] < E) order[next[expert[m]]++] = m;
}

#define FUNCTIONS(T, suffix)                                                                                           \
    extern "C" EXPORT void experts_##suffix(const T* x, i64 ldx, const i64* count, const i64* order, const float* gate, \
                                            i64 K, const T* w13, const T* w2, T* y, T* h, i64 N, i64 D, i64 E, i64 F,   \
                                            i64 threads) {                                                             \
        Forward<Products<T>::Gemm, T>{{starts(count, E), order, gate, K}, {N, D, E, F}, x, w13, w2, ldx, y, h}.run((int)threads); \
    }                                                                                                                  \
    extern "C" EXPORT void experts_backward_##suffix(                                                                  \
        const T* dy, const T* x, i64 ldx, const i64* count, const i64* order, const float* gate, i64 K, const T* w13,  \
        const T* w2, const T* h, T* dx, float* dgate, void* dw13, void* dw2, i64 wide, i64 add, T* act, T* dh,         \
        i64 ready, i64 N, i64 D, i64 E, i64 F, i64 threads) {                                                          \
        Backward<Products<T>::Gemm, T>{                                                                                \
            {starts(count, E), order, gate, K}, {N, D, E, F}, dy, x, w13, w2, h, ldx,                                             \
            {dx, dgate, dw13, dw2, wide != 0, add != 0, act, dh, ready != 0}}                                          \
            .run((int)threads);                                                                                        \
    }
FUNCTIONS(float, float32)
FUNCTIONS(bf16, bfloat16)
