// Matrix products of any layout: plain matrices in float32 where torch's are slower, and tests of gemm.hpp.
#include "gemm.hpp"

namespace {

constexpr i64 ROWS = 96, COLUMNS = 256, DEPTH = 256;  // a block of C, and how many k one pass over it sums

// A block of A from A(m, k) = from[k * ld + m], copied, since its columns may be pages apart.
template <class T>
FloatGemm::Left turned(float* room, const T* from, i64 M, i64 K, i64 ld) {
    for (i64 k = 0; k < K; ++k)
        each_vector(M, [&](i64 i, int n) { store_some(room + k * M + i, load_some(from + k * ld + i, n), n); });
    return {room, 1, M};
}
#if defined(BESSEMER_BF16)
Bf16Gemm::Left turned(bf16* room, const bf16* from, i64 M, i64 K, i64 ld) {
    return Bf16Gemm::left_transposed(room, from, M, K, ld);
}
#endif

// C [M, N] = or += A B, block by block. An element is a sum over k in ascending order, whatever M, N and the number of
// threads are, so neither other rows nor threads change its bits. What is added to C is the finished sum, as if it had
// been computed apart.
template <class G, class T>
void product(i64 M, i64 N, i64 K, const T* a, i64 ars, i64 acs, const T* b, i64 brs, i64 bcs, float* c, i64 ldc, bool add,
             int threads) {
    typedef typename G::Element E;
    i64 stripes = (N + COLUMNS - 1) / COLUMNS, blocks = (M + ROWS - 1) / ROWS;
    i64 ranges = threads <= 1 ? 1 : least(blocks, (threads + stripes - 1) / stripes);
    parallel(stripes * ranges, threads, [&](i64 task) {
        typename G::Session session;
        E* right = scratch<0, E>(G::b_size(DEPTH, COLUMNS));
        E* left = scratch<1, E>(G::a_rows(ROWS) * G::a_width(DEPTH));
        i64 n = task / ranges * COLUMNS, columns = least(COLUMNS, N - n);
        i64 first = blocks * (task % ranges) / ranges, last = blocks * (task % ranges + 1) / ranges;
        i64 top = first * ROWS, height = least(M, last * ROWS) - top;
        bool apart = add && K > DEPTH;
        float* out = apart ? scratch<2, float>(height * columns) : c + top * ldc + n;
        i64 ld = apart ? columns : ldc;
        for (i64 k = 0; k == 0 || k < K; k += DEPTH) {
            i64 depth = least(DEPTH, K - k), width = G::a_width(depth);
            G::pack_b(right, b + k * brs + n * bcs, depth, columns, brs, bcs);
            for (i64 block = first; block < last; ++block) {
                i64 m = block * ROWS, rows = least(ROWS, M - m);
                const T* from = a + m * ars + k * acs;
                float* to = out + (m - top) * ld;
                bool more = k > 0 || (add && !apart);
                if (ars == 1 && acs != 1) {
                    G::multiply(rows, columns, depth, turned(left, from, rows, depth, acs), right, to, ld, more);
                } else {
                    G::pack_a(left, from, rows, depth, ars, acs);
                    G::multiply(rows, columns, depth, G::left(left, width), right, to, ld, more);
                }
            }
        }
        for (i64 m = 0; apart && m < height; ++m) {
            float* to = c + (top + m) * ldc + n;
            each_vector(columns, [&](i64 i, int some) {
                store_some(to + i, load_some(to + i, some) + load_some(out + m * ld + i, some), some);
            });
        }
    });
}
}  // namespace

extern "C" EXPORT void product_float32(i64 M, i64 N, i64 K, const float* a, i64 ars, i64 acs, const float* b, i64 brs, i64 bcs,
                                       float* c, i64 ldc, i64 add, i64 threads) {
    product<FloatGemm>(M, N, K, a, ars, acs, b, brs, bcs, c, ldc, add != 0, (int)threads);
}
extern "C" EXPORT void product_bfloat16(i64 M, i64 N, i64 K, const bf16* a, i64 ars, i64 acs, const bf16* b, i64 brs, i64 bcs,
                                        float* c, i64 ldc, i64 add, i64 threads) {
#if defined(BESSEMER_BF16)
    product<Bf16Gemm>(M, N, K, a, ars, acs, b, brs, bcs, c, ldc, add != 0, (int)threads);
#else
    product<FloatGemm>(M, N, K, a, ars, acs, b, brs, bcs, c, ldc, add != 0, (int)threads);
#endif
}
