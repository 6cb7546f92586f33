// Products of a few rows with matrices as nn.Linear stores them, [out, in]: y[m, n] = sum over k of x[m, k] w[n, k].
//
// Nothing is kept between calls. In float32 every element is one chain of additions over ascending k, so its bits
// depend neither on the other rows nor on how the work is divided: many rows share a panel of w that is transposed
// once, while few rows read w block by block through registers. BF16 matrices use AMX tiles if there are any and the
// widths fit (w in place is the left operand, so the result is transposed), and float32 otherwise.
#pragma once

#include "gemm.hpp"

constexpr int PANEL = 2 * W;  // columns per register tile
constexpr int FEW = 4;        // up to this many rows, no panel is stored

template <class T>
static __attribute__((noinline)) void load_corner(float* to, const T* w, i64 ldw, i64 rows, i64 columns) {
    for (i64 i = 0; i < W; ++i)
        for (i64 j = 0; j < W; ++j) to[i * W + j] = i < rows && j < columns ? widen(w[i * ldw + j]) : 0.0f;
}
// Up to W rows of w, from column k on, transposed: block[i] is column k + i; missing elements are 0.
template <class T>
INLINE void load_transposed(vf* block, const T* w, i64 ldw, i64 rows, i64 k, i64 K) {
    if (rows >= W && K - k >= W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = load(w + i * ldw + k);
    } else {
        float corner[W * W];
        load_corner(corner, w + k, ldw, rows, K - k);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = load(corner + i * W);
    }
    transpose(block);
}

// The panel [K, PANEL] of `columns` rows of w.
template <class T>
static __attribute__((noinline)) void transpose_panel(float* to, const T* w, i64 ldw, i64 columns, i64 K) {
    for (i64 k = 0; k < K; k += W)
        for (int j = 0; j < columns; j += W) {
            vf block[W];
            load_transposed(block, w + j * ldw, ldw, columns - j, k, K);
            int width = (int)least(W, K - k);
            for (int i = 0; i < width; ++i) store(to + (k + i) * PANEL + j, block[i]);
        }
}

template <int R, class T>
static __attribute__((noinline)) void few_rows(const float* x, i64 ldx, const T* w, i64 ldw, i64 columns, i64 K, float* y, i64 ldy) {
    for (i64 n = 0; n < columns; n += W) {
        vf sum[R] = {};
        for (i64 k = 0; k < K; k += W) {
            vf block[W];
            load_transposed(block, w + n * ldw, ldw, columns - n, k, K);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) __builtin_prefetch(w + (n + W + i) * ldw + k);
            int width = (int)least(W, K - k);
            if (width == W) {
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i)
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) sum[r] += splat(x[r * ldx + k + i]) * block[i];
            } else {
                for (int i = 0; i < width; ++i)
                    for (int r = 0; r < R; ++r) sum[r] += splat(x[r * ldx + k + i]) * block[i];
            }
        }
        for (int r = 0; r < R; ++r)
            if (columns - n >= W)
                store(y + r * ldy + n, sum[r]);
            else
                store_part(y + r * ldy + n, sum[r], (int)(columns - n));
    }
}

// Input rows of products: float32, and for tiles also BF16 in the layout of their right operand.
struct Input {
    const float* x;
    i64 ld, M, K;
    const bf16* packed;
};

#if defined(BESSEMER_TILES)
// 16 rows x[m .. m + 15] as a right operand, [K / 2][16][2]; rows beyond M are 0.
static void pack_tokens(bf16* to, const float* x, i64 ld, i64 M, i64 K) {
    bf16* rows = scratch<52, bf16>(16 * K);
    for (int m = 0; m < 16; ++m)
        if (m < M)
            for (i64 k = 0; k < K; k += W) store(rows + m * K + k, load(x + m * ld + k));
        else
            memset((void*)(rows + m * K), 0, K * sizeof(bf16));
    for (i64 k = 0; k < K / 2; k += W)  // pairs of numbers
        for (int m = 0; m < 16; m += W) {
            vf block[W];
            for (int i = 0; i < W; ++i) block[i] = load((const float*)(rows + (m + i) * K) + k);
            transpose(block);
            for (int i = 0; i < W; ++i) store((float*)to + (k + i) * 16 + m, block[i]);
        }
}
#endif

// Rows for products with matrices of T. They stay in SLOT's buffer until its next use; threads share the packing.
template <int SLOT, class T>
static Input input(const float* x, i64 ld, i64 M, i64 K, int threads = 1) {
    Input in{x, ld, M, K, nullptr};
#if defined(BESSEMER_TILES)
    if (sizeof(T) == 2 && K % 32 == 0) {
        bf16* packed = scratch<SLOT, bf16>(round_up(M, 16) * K);
        parallel(round_up(M, 16) / 16, threads, [&](i64 i) {
            pack_tokens(packed + i * 16 * K, x + i * 16 * ld, ld, M - i * 16, K);
        });
        in.packed = packed;
    }
#endif
    return in;
}

// y [M, columns] for `columns` <= PANEL rows of w.
template <class T>
static __attribute__((noinline)) void product_panel(const Input& in, const T* w, i64 ldw, i64 columns, float* y, i64 ldy, const T* ahead = nullptr) {
#if defined(BESSEMER_TILES)
    if constexpr (sizeof(T) == 2)
        if (in.M && in.packed && columns % 16 == 0) {
            i64 MP = round_up(in.M, 16);
            float* out = scratch<53, float>(columns * MP);
            {
                Bf16Gemm::Session session;
                Bf16Gemm::multiply(columns, MP, in.K, w, ldw, in.packed, out, MP, false);
            }
            for (i64 m = 0; m < in.M; m += W)
                for (i64 n = 0; n < columns; n += W) {
                    vf block[W];
                    for (int i = 0; i < W; ++i) block[i] = load(out + (n + i) * MP + m);
                    transpose(block);
                    for (int i = 0; i < W && m + i < in.M; ++i) store(y + (m + i) * ldy + n, block[i]);
                }
            return;
        }
#endif
    switch (in.M) {
        case 0: return;
        case 1: return few_rows<1>(in.x, in.ld, w, ldw, columns, in.K, y, ldy);
        case 2: return few_rows<2>(in.x, in.ld, w, ldw, columns, in.K, y, ldy);
        case 3: return few_rows<3>(in.x, in.ld, w, ldw, columns, in.K, y, ldy);
        case 4: return few_rows<4>(in.x, in.ld, w, ldw, columns, in.K, y, ldy);
    }
    static_assert(FEW == 4);
    float* panel = scratch<54, float>(in.K * PANEL);
    transpose_panel(panel, w, ldw, columns, in.K);
    const T* next = ahead ? ahead : w + PANEL * ldw;
    FloatGemm::multiply_rows(in.M, columns, in.K, in.x, in.ld, 1, panel, PANEL, y, ldy, false, next);
}

// y [M, N] = x w^T; `after` is read next.
template <class T>
static void product_rows(const Input& in, const T* w, i64 N, float* y, i64 ldy, const T* after = nullptr) {
    for (i64 n = 0; n < N; n += PANEL)
        product_panel(in, w + n * in.K, in.K, least(PANEL, N - n), y + n, ldy, n + PANEL < N ? nullptr : after);
}
