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

// A symmetric product [R, R] of A [R, K] and a packed B: computes the upper triangle and mirrors it.
void symmetric(i64 R, i64 K, const float* a, const float* b, float* out) {
    constexpr i64 NR = FloatGemm::NR;
    for (i64 n = 0; n < R; n += NR)
        FloatGemm::multiply(least(R, n + NR), least(NR, R - n), K, a, K, b + n * K, out + n, R, false);
    for (i64 r = 0; r < R; r += W)
        for (i64 c = r + W; c < R; c += W) {
            int height = (int)least(W, R - r), width = (int)least(W, R - c);
            vf block[W] = {};
            for (int i = 0; i < height; ++i) block[i] = load_some(out + (r + i) * R + c, width);
            transpose(block);
            for (int i = 0; i < width; ++i) store_some(out + (c + i) * R + r, block[i], height);
        }
}

// One matrix x [R, C] with R <= C, in place.
void iterate(float* x, i64 R, i64 C, int steps, float a, float b, float c) {
    float* square = scratch<0, float>(R * R);
    float* polynomial = scratch<1, float>(R * R);
    float* right = scratch<2, float>(FloatGemm::b_size(C, R) + FloatGemm::b_size(R, C));
    float* next = scratch<3, float>(R * C);
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
    for (int step = 0; step < steps; ++step) {
        FloatGemm::pack_b(right, x, C, R, 1, C);
        symmetric(R, C, x, right, square);
        FloatGemm::pack_b(right, square, R, R, R, 1);
        symmetric(R, R, square, right, polynomial);
        each_vector(R * R, [&](i64 i, int n) { store_some(polynomial + i, load_some(square + i, n) * b + load_some(polynomial + i, n) * c, n); });
        for (i64 r = 0; r < R; ++r) polynomial[r * R + r] += a;
        FloatGemm::pack_b(right, x, R, C, C, 1);
        FloatGemm::multiply(R, C, R, polynomial, R, right, next, C, false);
        memcpy(x, next, R * C * sizeof(float));
    }
}

}  // namespace

// N matrices [R, C], in place.
extern "C" EXPORT void newton_schulz(float* x, i64 N, i64 R, i64 C, i64 steps, float a, float b, float c, i64 threads) {
    parallel(N, (int)threads, [&](i64 n) {
        float* mine = x + n * R * C;
        if (R <= C) {
            iterate(mine, R, C, (int)steps, a, b, c);
            return;
        }
        float* turned = scratch<4, float>(R * C);
        transposed(turned, mine, R, C);
        iterate(turned, C, R, (int)steps, a, b, c);
        transposed(mine, turned, C, R);
    });
}
