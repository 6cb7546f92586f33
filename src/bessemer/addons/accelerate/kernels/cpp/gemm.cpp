// The products on vector units, compiled once for all kernels.
#include "gemm.hpp"

namespace {

__attribute__((noinline)) void copy_rows(float* to, i64 ld_to, const float* from, i64 ld, i64 rows, i64 columns) {
    for (i64 i = 0; i < rows; ++i) memcpy(to + i * ld_to, from + i * ld, columns * sizeof(float));
}

// C has R rows and at most V vectors of columns. With AHEAD, K cache lines from `ahead` on are prefetched meanwhile.
template <int R, int V, bool AHEAD>
__attribute__((noinline)) void registers(int columns, i64 K, const float* a, i64 ars, i64 acs, const float* b, i64 ldb,
                                         float* c, i64 ldc, bool add, const char* ahead) {
    vf sum[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sum[i][j] = (vf){};
    // Offsets of twelve rows take more registers than there are; offsets within groups of three rows take two.
    constexpr int NEAR = R > 6 ? 3 : R, GROUPS = (R + NEAR - 1) / NEAR;
    const float* rows[GROUPS];
#pragma GCC unroll 4
    for (int i = 0; i < GROUPS; ++i) rows[i] = a + NEAR * i * ars;
    for (i64 k = 0; k < K; ++k, b += ldb) {
        if (AHEAD) __builtin_prefetch(ahead + 64 * k, 0, 2);
        vf right[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) right[j] = load(b + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            vf left = splat(rows[i / NEAR][i % NEAR * ars]);
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) sum[i][j] += left * right[j];
        }
#pragma GCC unroll 4
        for (int i = 0; i < GROUPS; ++i) rows[i] += acs;
    }
    // Partial vectors go through a local buffer: two forms of every access would be most of this code.
    float part[R * V * W];
    bool whole = columns == V * W;
    float* out = whole ? c : part;
    i64 ld = whole ? ldc : V * W;
    if (add) {
        if (!whole) copy_rows(part, ld, c, ldc, R, columns);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) sum[i][j] = load(out + i * ld + j * W) + sum[i][j];
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) store(out + i * ld + j * W, sum[i][j]);
    if (!whole) copy_rows(c, ldc, part, ld, R, columns);
}

template <int R, int V, bool AHEAD>
INLINE void block(i64 rows, int columns, i64 K, const float* a, i64 ars, i64 acs, const float* b, i64 ldb, float* c,
                  i64 ldc, bool add, const char* ahead) {
    if constexpr (R > 1) {
        if (rows < R) {
            block<R - 1, V, AHEAD>(rows, columns, K, a, ars, acs, b, ldb, c, ldc, add, ahead);
            return;
        }
    }
    registers<R, V, AHEAD>(columns, K, a, ars, acs, b, ldb, c, ldc, add, ahead);
}

// V vectors of C's columns, in blocks of at most R rows and of equal height. `next`: a panel of 2 K cache lines.
template <int V, int R>
INLINE void panel(i64 M, i64 columns, i64 K, const float* a, i64 ars, i64 acs, const float* b, i64 ldb, float* c,
                  i64 ldc, bool add, const void* next = nullptr) {
    int width = (int)least(V * W, columns);
    i64 blocks = (M + R - 1) / R;
    for (i64 i = 0, m = 0; i < blocks; ++i) {
        i64 end = (i + 1) * M / blocks;
        if (V == 2 && next && i < 2)
            block<R, V, V == 2>(end - m, width, K, a + m * ars, ars, acs, b, ldb, c + m * ldc, ldc, add,
                                (const char*)next + i * K * 64);
        else
            block<R, V, false>(end - m, width, K, a + m * ars, ars, acs, b, ldb, c + m * ldc, ldc, add, nullptr);
        m = end;
    }
}

}  // namespace

void FloatGemm::multiply(i64 M, i64 N, i64 K, const float* a, i64 ars, i64 acs, const float* b, float* c, i64 ldc,
                         bool add) {
    for (i64 n = 0; n < N; n += NR, b += K * NR) panel<NV, MR>(M, N - n, K, a, ars, acs, b, NR, c + n, ldc, add);
}

void FloatGemm::multiply_rows(i64 M, i64 N, i64 K, const float* a, i64 ars, i64 acs, const float* b, i64 ldb, float* c,
                              i64 ldc, bool add, const void* next) {
    for (i64 n = 0; n < N;) {
        i64 left = N - n;
        if constexpr (MR == 12) {
            if (left > 2 * W && left <= 3 * W) {  // as many accumulators as 12 rows of two vectors, and none empty
                panel<3, 8>(M, left, K, a, ars, acs, b + n, ldb, c + n, ldc, add);
                return;
            }
        }
        if (left > W) {
            panel<2, MR>(M, left, K, a, ars, acs, b + n, ldb, c + n, ldc, add, next);
            n += 2 * W;
        } else {
            panel<1, MR>(M, left, K, a, ars, acs, b + n, ldb, c + n, ldc, add, next);
            n += W;
        }
    }
}

#if defined(BESSEMER_BF16) && !defined(BESSEMER_TILES)
namespace {

// R rows and V vectors of C, `last` the mask of the last vector. An instruction multiplies a pair of A's elements, the
// same for all lanes, with a pair of every lane's column.
template <int R, int V>
__attribute__((noinline)) void pairs_of(i64 K, const bf16* a, i64 lda, const bf16* b, i64 panel, float* c, i64 ldc,
                                        bool add, __mmask16 last) {
    __m512 sum[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j)
            sum[i][j] = add ? _mm512_maskz_loadu_ps(j == V - 1 ? last : 0xffff, c + i * ldc + j * 16) : _mm512_setzero_ps();
    constexpr int NEAR = R > 6 ? 3 : R, GROUPS = (R + NEAR - 1) / NEAR;  // as in `registers`
    const bf16* rows[GROUPS];
#pragma GCC unroll 4
    for (int i = 0; i < GROUPS; ++i) rows[i] = a + NEAR * i * lda;
    for (i64 k = 0; k < K; k += 2, b += 32) {
        __m512bh right[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + j * panel);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            int32_t pair;
            memcpy(&pair, rows[i / NEAR] + i % NEAR * lda, 4);
            __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < GROUPS; ++i) rows[i] += 2;
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) _mm512_mask_storeu_ps(c + i * ldc + j * 16, j == V - 1 ? last : 0xffff, sum[i][j]);
}

template <int R, int V>
INLINE void pairs_of(i64 rows, i64 K, const bf16* a, i64 lda, const bf16* b, i64 panel, float* c, i64 ldc, bool add,
                     __mmask16 last) {
    if constexpr (R > 1) {
        if (rows < R) return pairs_of<R - 1, V>(rows, K, a, lda, b, panel, c, ldc, add, last);
    }
    pairs_of<R, V>(K, a, lda, b, panel, c, ldc, add, last);
}

template <int V>
INLINE void pairs_panel(i64 M, i64 columns, i64 K, const bf16* a, i64 lda, const bf16* b, i64 panel, float* c, i64 ldc,
                        bool add) {
    i64 over = columns - (V - 1) * 16, blocks = (M + 11) / 12;
    __mmask16 last = over >= 16 ? 0xffff : (__mmask16)((1u << over) - 1);
    for (i64 i = 0, m = 0; i < blocks; ++i) {
        i64 end = (i + 1) * M / blocks;
        pairs_of<12, V>(end - m, K, a + m * lda, lda, b, panel, c + m * ldc, ldc, add, last);
        m = end;
    }
}

}  // namespace

void Bf16Gemm::multiply(i64 M, i64 N, i64 K, const bf16* a, i64 lda, const bf16* b, float* c, i64 ldc, bool add) {
    i64 panel = round_up(K, 32) * 16;
    for (i64 n = 0; n < N; n += 32, b += 2 * panel)
        if (N - n > 16)
            pairs_panel<2>(M, N - n, K, a, lda, b, panel, c + n, ldc, add);
        else
            pairs_panel<1>(M, N - n, K, a, lda, b, panel, c + n, ldc, add);
}
#endif
