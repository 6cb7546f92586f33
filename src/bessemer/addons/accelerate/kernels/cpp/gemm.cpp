// The float32 products, compiled once for all kernels.
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
