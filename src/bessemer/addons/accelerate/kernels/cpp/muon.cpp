// Muon's Newton-Schulz iterations on matrices that stay in a core's cache: X <- a X + (b S + c S^2) X, S = X X^T.
#include "gemm.hpp"

namespace {

void transposed(float* to, const float* from, i64 rows, i64 columns) {
    for (i64 r = 0; r < rows; r += W)
        for (i64 c = 0; c < columns; c += W) {
            int height = (int)least(W, rows - r), width = (int)least(W, columns - c);
            vf block[W] = {};
            for (int i = 0; i < height; ++i)
                block[i] = load_some(from + (r + i) * columns + c, width);
            transpose(block);
            for (int i = 0; i < width; ++i) store_some(to + (c + i) * rows + r, block[i], height);
        }
}

// Copies the upper triangle of [R, R] to the lower one.
void mirror(float* x, i64 R) {
    for (i64 r = 0; r < R; r += W)
        for (i64 c = r + W; c < R; c += W) {
            int height = (int)least(W, R - r), width = (int)least(W, R - c);
            vf block[W] = {};
            for (int i = 0; i < height; ++i) block[i] = load_some(x + (r + i) * R + c, width);
            transpose(block);
            for (int i = 0; i < width; ++i) store_some(x + (c + i) * R + r, block[i], height);
        }
}

// Divides x [R, C] by its Frobenius norm.
void normalise(float* x, i64 R, i64 C) {
    double total = 0.0;
    for (i64 r = 0; r < R; ++r) {
        vf part = {};
        each_vector(C, [&](i64 i, int n) {
            vf v = load_some(x + r * C + i, n);
            part += v * v;
        });
        total += sum(part);
    }
    float norm = (float)__builtin_sqrt(total);
    vf scale = splat(1.0f / (norm > 1e-12f || norm != norm ? norm : 1e-12f));
    each_vector(R * C, [&](i64 i, int n) { store_some(x + i, load_some(x + i, n) * scale, n); });
}

// Rows of float32 as left operands of G: in place, or rounded to BF16 in `room`.
template <class G>
struct Rows;
template <>
struct Rows<FloatGemm> {
    const float* p;
    i64 ld;
    Rows(float* room, const float* x, i64 R, i64 C) : p(x), ld(C) {}
};
#if defined(BESSEMER_BF16)
template <>
struct Rows<Bf16Gemm> {
    const bf16* p;
    i64 ld;
    Rows(bf16* room, const float* x, i64 R, i64 C) : p(room), ld(Bf16Gemm::a_width(C)) {
        for (i64 r = 0; r < R; ++r, room += ld) {
            each_vector(C, [&](i64 i, int n) { store_some(room + i, load_some(x + r * C + i, n), n); });
            for (i64 i = C; i < ld; ++i) room[i] = bf16{0};
        }
    }
};
#endif

// A symmetric product [R, R] of A [R, K] and a packed B: computes the upper triangle, mirrors it.
template <class G, class E>
void symmetric(i64 R, i64 K, const Rows<G>& a, const E* b, float* out) {
    for (i64 n = 0; n < R; n += G::NR)
        G::multiply(least(R, n + G::NR), least(G::NR, R - n), K, a.p, a.ld, b + n * G::a_width(K), out + n, R, false);
    mirror(out, R);
}

struct Rule {
    i64 steps;
    float a, b, c, scale;
};

// One matrix x [R, C] with R <= C, in place. x and all sums are float32, operands are G's. All terms read the rounded
// operands: the iteration corrects a rounding that they have in common, and none that only some of them have.
template <class G>
void iterate(float* x, i64 R, i64 C, const Rule& rule) {
    typedef typename G::Element E;
    typename G::Session session;
    float* square = scratch<0, float>(R * R);
    float* polynomial = scratch<1, float>(R * R);
    float* next = scratch<2, float>(R * C);
    E* right = scratch<3, E>(G::b_size(C, R) + G::b_size(R, C));
    E* room = scratch<4, E>(G::a_rows(R) * G::a_width(C));
    E* room_square = scratch<5, E>(G::a_rows(R) * G::a_width(R));
    normalise(x, R, C);
    for (i64 step = 0; step < rule.steps; ++step) {
        Rows<G> rows(room, x, R, C);
        G::pack_b(right, rows.p, C, R, 1, rows.ld);
        symmetric<G>(R, C, rows, right, square);
        Rows<G> squares(room_square, square, R, R);
        G::pack_b(right, squares.p, R, R, squares.ld, 1);
        symmetric<G>(R, R, squares, right, polynomial);
        for (i64 r = 0; r < R; ++r)
            each_vector(R, [&](i64 i, int n) {
                vf linear = load_some(squares.p + r * squares.ld + i, n) * rule.b;
                store_some(polynomial + r * R + i, linear + load_some(polynomial + r * R + i, n) * rule.c, n);
            });
        Rows<G> factors(room_square, polynomial, R, R);
        G::pack_b(right, rows.p, R, C, rows.ld, 1);
        G::multiply(R, C, R, factors.p, factors.ld, right, next, C, false);
        float last = step + 1 == rule.steps ? rule.scale : 1.0f;
        for (i64 r = 0; r < R; ++r)
            each_vector(C, [&](i64 i, int n) {
                vf kept = load_some(rows.p + r * rows.ld + i, n) * rule.a;
                store_some(x + r * C + i, (kept + load_some(next + r * C + i, n)) * last, n);
            });
    }
}

template <class G>
void orthogonalise(float* x, i64 N, i64 R, i64 C, const Rule& rule, i64 threads) {
    parallel(N, (int)threads, [&](i64 n) {
        float* mine = x + n * R * C;
        if (R <= C) {
            iterate<G>(mine, R, C, rule);
            return;
        }
        float* turned = scratch<6, float>(R * C);
        transposed(turned, mine, R, C);
        iterate<G>(turned, C, R, rule);
        transposed(mine, turned, C, R);
    });
}

}  // namespace

// N matrices [R, C] of float32, in place, times `scale`; products in float32 or, where there are tiles, in BF16.
extern "C" EXPORT void newton_schulz_float32(float* x, i64 N, i64 R, i64 C, i64 steps, float a, float b, float c,
                                             float scale, i64 threads) {
    orthogonalise<FloatGemm>(x, N, R, C, {steps, a, b, c, scale}, threads);
}
extern "C" EXPORT void newton_schulz_bfloat16(float* x, i64 N, i64 R, i64 C, i64 steps, float a, float b, float c,
                                              float scale, i64 threads) {
#if defined(BESSEMER_BF16)
    orthogonalise<Bf16Gemm>(x, N, R, C, {steps, a, b, c, scale}, threads);
#else
    orthogonalise<FloatGemm>(x, N, R, C, {steps, a, b, c, scale}, threads);
#endif
}
