// A single matrix product of any layout, to test and measure gemm.hpp.
#include "gemm.hpp"

namespace {
template <class G, class T>
void product(i64 M, i64 N, i64 K, const T* a, i64 ars, i64 acs, const T* b, i64 brs, i64 bcs, float* c, i64 ldc, bool add) {
    typedef typename G::Element E;
    typename G::Session session;
    E* right = scratch<0, E>(G::b_size(K, N));
    E* left = scratch<1, E>(round_up(M, 16) * G::a_width(K));
    G::pack_b(right, b, K, N, brs, bcs);
    G::pack_a(left, a, M, K, ars, acs);
    G::multiply(M, N, K, left, G::a_width(K), right, c, ldc, add);
}
}  // namespace

extern "C" EXPORT void product_float32(i64 M, i64 N, i64 K, const float* a, i64 ars, i64 acs, const float* b, i64 brs, i64 bcs,
                                       float* c, i64 ldc, i64 add) {
    product<FloatGemm>(M, N, K, a, ars, acs, b, brs, bcs, c, ldc, add != 0);
}
extern "C" EXPORT void product_bfloat16(i64 M, i64 N, i64 K, const bf16* a, i64 ars, i64 acs, const bf16* b, i64 brs, i64 bcs,
                                        float* c, i64 ldc, i64 add) {
#if defined(BESSEMER_BF16)
    product<Bf16Gemm>(M, N, K, a, ars, acs, b, brs, bcs, c, ldc, add != 0);
#else
    product<FloatGemm>(M, N, K, a, ars, acs, b, brs, bcs, c, ldc, add != 0);
#endif
}
