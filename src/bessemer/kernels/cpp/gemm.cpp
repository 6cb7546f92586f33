// The products of float32, compiled once for all kernels.
#include "gemm.hpp"

namespace {

// C has R rows and at most V vectors of columns.
template <int R, int V>
__attribute__((noinline)) void registers(int columns, i64 K, const float* a, i64 ars, i64 acs, const float* b, i64 ldb,
                                         float* c, i64 ldc, bool add) {
    vf sum[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sum[i][j] = (vf){};
    for (i64 k = 0; k < K; ++k, b += ldb, a += acs) {
        vf right[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) right[j] = load(b + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            vf left = splat(a[i * ars]);
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) sum[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
            float* to = c + i * ldc + j * W;
            int left = columns - j * W;
            if (left >= W)
                store(to, add ? load(to) + sum[i][j] : sum[i][j]);
            else if (left > 0)
                store_part(to, add ? load_part(to, left) + sum[i][j] : sum[i][j], left);
        }
}

template <int R, int V>
INLINE void block(i64 rows, int columns, i64 K, const float* a, i64 ars, i64 acs, const float* b, i64 ldb, float* c,
                  i64 ldc, bool add) {
    if constexpr (R > 1) {
        if (rows < R) {
            block<R - 1, V>(rows, columns, K, a, ars, acs, b, ldb, c, ldc, add);
            return;
        }
    }
    registers<R, V>(columns, K, a, ars, acs, b, ldb, c, ldc, add);
}

// V vectors of C's columns, in blocks of at most R rows.
template <int V, int R>
INLINE void panel(i64 M, i64 columns, i64 K, const float* a, i64 ars, i64 acs, const float* b, i64 ldb, float* c,
                  i64 ldc, bool add) {
    int width = (int)least(V * W, columns);
    for (i64 m = 0; m < M; m += R)
        block<R, V>(least(R, M - m), width, K, a + m * ars, ars, acs, b, ldb, c + m * ldc, ldc, add);
}

}  // namespace

void FloatGemm::multiply(i64 M, i64 N, i64 K, const float* a, i64 ars, i64 acs, const float* b, float* c, i64 ldc,
                         bool add) {
    for (i64 n = 0; n < N; n += NR, b += K * NR) panel<NV, MR>(M, N - n, K, a, ars, acs, b, NR, c + n, ldc, add);
}

void FloatGemm::multiply_rows(i64 M, i64 N, i64 K, const float* a, i64 ars, i64 acs, const float* b, i64 ldb, float* c,
                              i64 ldc, bool add) {
    for (i64 n = 0; n < N;) {
        i64 left = N - n;
        if constexpr (MR == 12) {
            if (left > 2 * W && left <= 3 * W) {  // as many sums as in 12 rows of two vectors, and no empty one
                panel<3, 8>(M, left, K, a, ars, acs, b + n, ldb, c + n, ldc, add);
                return;
            }
        }
        if (left > W) {
            panel<2, MR>(M, left, K, a, ars, acs, b + n, ldb, c + n, ldc, add);
            n += 2 * W;
        } else {
            panel<1, MR>(M, left, K, a, ars, acs, b + n, ldb, c + n, ldc, add);
            n += W;
        }
    }
}
