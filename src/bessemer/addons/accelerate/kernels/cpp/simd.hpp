// Float32 vectors as wide as the target's, in the compilers' own vector types: the same source compiles to AVX-512,
// AVX2 and NEON. Nothing here depends on -ffast-math; NaN and infinity follow IEEE 754.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__SSE__)
#include <immintrin.h>
#endif

typedef int64_t i64;

// Floats in a vector.
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef float vf_mem __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint16_t vh_mem __attribute__((vector_size(2 * W), aligned(2), may_alias));

// A BF16 number: the upper half of a float32.
struct bf16 {
    uint16_t bits;
};

#define INLINE inline __attribute__((always_inline))
// The functions that Python calls.
#define EXPORT __attribute__((visibility("default")))

// While it lives, subnormal float32 numbers are 0 in this thread. On x86 they take a hundred times as long as others,
// and products of small probabilities and small gradients are full of them.
struct NoDenormals {
#if defined(__SSE__)
    unsigned before = _mm_getcsr();
    NoDenormals() { _mm_setcsr(before | 0x8040); }
    ~NoDenormals() { _mm_setcsr(before); }
#else
    NoDenormals() {}
#endif
};

INLINE vf splat(float x) { return x - (vf){}; }
INLINE vf select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
// Returns the second argument if either is NaN.
#if defined(__AVX512F__)
INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#else
INLINE vf vmax(vf a, vf b) { return select((vi)(a > b), a, b); }
#endif

// --- float32 and BF16 in memory --------------------------------------------------------------------------------------

INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
// Rounds to nearest, ties to even; NaN stays NaN.
INLINE bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return {0x7fc0};
    return {(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
INLINE void put(float* to, float x) { *to = x; }
INLINE void put(bf16* to, float x) { *to = narrow(x); }

// Converts 16-bit words to 32 bits and back; GCC's own conversions take several instructions.
INLINE vu longer(vh x) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu16_epi32((__m256i)x);
#else
    return __builtin_convertvector(x, vu);
#endif
}
INLINE vh shorter(vu x) {
#if defined(__AVX512F__)
    return (vh)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return __builtin_convertvector(x, vh);
#endif
}

INLINE vf load(const float* p) { return *(const vf_mem*)p; }
INLINE vf load(const bf16* p) { return (vf)(longer(*(const vh_mem*)p) << 16); }
INLINE void store(float* p, vf x) { *(vf_mem*)p = x; }
// Rounded to BF16, in the lower halves of 32-bit words.
INLINE vu bf16_bits(vf x) {
#if defined(__AVX512BF16__)
    return longer((vh)_mm512_cvtneps_pbh((__m512)x));
#else
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vi is_nan = (vi)(x != x);
    return (rounded & (vu)~is_nan) | ((vu)is_nan & 0x7fc0);
#endif
}
INLINE void store(bf16* p, vf x) {
#if defined(__AVX512BF16__)
    *(vh_mem*)p = (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    *(vh_mem*)p = shorter(bf16_bits(x));
#endif
}

// The first n < W elements; the others are 0.
template <class T>
INLINE vf load_part(const T* p, int n) {
    T some[W] = {};
    for (int i = 0; i < n; ++i) some[i] = p[i];
    return load(some);
}
template <class T>
INLINE void store_part(T* p, vf x, int n) {
    T some[W];
    store(some, x);
    for (int i = 0; i < n; ++i) p[i] = some[i];
}
#if defined(__AVX512F__)
INLINE vf load_part(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
INLINE void store_part(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)x); }
#endif

// Interleaves two rows, as tiles require: lane i holds even[i] in its lower and odd[i] in its upper half.
INLINE vu pairs(const bf16* even, const bf16* odd) {
    vu low = __builtin_convertvector((vh)(*(const vh_mem*)even), vu);
    return low | __builtin_convertvector((vh)(*(const vh_mem*)odd), vu) << 16;
}

// n numbers, W or fewer.
template <class T>
INLINE vf load_some(const T* p, int n) {
    return n == W ? load(p) : load_part(p, n);
}
template <class T>
INLINE void store_some(T* p, vf x, int n) {
    n == W ? store(p, x) : store_part(p, x, n);
}
// each(i, how many) for every vector of n numbers.
template <class Each>
INLINE void each_vector(i64 n, const Each& each) {
    i64 i = 0;
    for (; i + W <= n; i += W) each(i, W);
    if (i < n) each(i, (int)(n - i));
}

// --- across lanes ----------------------------------------------------------------------------------------------------

// Lanes of a and, from W on, of b.
template <int... J>
INLINE vf pick(vf a, vf b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, J...);
#else
    return __builtin_shuffle(a, b, (vi){J...});
#endif
}

template <int D, bool UPPER, int... J>
INLINE vf exchange(vf a, vf b, std::integer_sequence<int, J...>) {
    if constexpr (UPPER)
        return pick<((J & D) == 0 ? J + D : J + W)...>(a, b);
    else
        return pick<((J & D) == 0 ? J : J - D + W)...>(a, b);
}
template <int D, bool UPPER>
INLINE vf exchange(vf a, vf b) {
    return exchange<D, UPPER>(a, b, std::make_integer_sequence<int, W>{});
}

template <int D>
INLINE void transpose_from(vf* v) {
    if constexpr (D < W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
            if ((i & D) == 0) {
                vf a = v[i], b = v[i + D];
                v[i] = exchange<D, false>(a, b);
                v[i + D] = exchange<D, true>(a, b);
            }
        transpose_from<2 * D>(v);
    }
}
// Transposes W vectors in place.
INLINE void transpose(vf* v) { transpose_from<1>(v); }

template <int D, int... J>
INLINE vf rotate_lanes(vf x, std::integer_sequence<int, J...>) {
    return pick<((J + D) % W)...>(x, x);
}
template <int D>
INLINE vf folded_sum(vf x) {
    if constexpr (D > 0) return folded_sum<D / 2>(x + rotate_lanes<D>(x, std::make_integer_sequence<int, W>{}));
    return x;
}
template <int D>
INLINE vf folded_max(vf x) {
    if constexpr (D > 0) return folded_max<D / 2>(vmax(x, rotate_lanes<D>(x, std::make_integer_sequence<int, W>{})));
    return x;
}
INLINE float sum(vf x) { return folded_sum<W / 2>(x)[0]; }
INLINE float max_of(vf x) { return folded_max<W / 2>(x)[0]; }

// --- exp and sigmoid -------------------------------------------------------------------------------------------------

// e^x within 2 units in the last place; exactly 0 below -87.33, where results would be subnormal and slow; inf above
// 88.72; NaN for NaN.
INLINE vf vexp(vf x) {
#if defined(__AVX512F__)
    // No selects needed: minimum and maximum return their second operand if it is NaN, and the scaling turns values
    // that are too large into infinity. (x < low) costs one mask.
    const __m512 low = _mm512_set1_ps(-87.33f);
    const vf y = (vf)_mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(low, (__m512)x));
    __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, low, _CMP_NLT_UQ);
#else
    const vf low = splat(-87.33f), high = splat(88.72f);
    vf y = select((vi)(x < low), low, x);
    y = select((vi)(y > high), high, y);
#endif
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    vf t = y * 1.44269504f + magic;
    vf n = t - magic;
    vf r = y - n * 0.693145752f;  // ln 2 in two parts
    r = r - n * 1.42860677e-6f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
    vi scale = ((vi)t - (vi)magic) << 23;
    vf result = (vf)((vi)p + scale);
    result = select((vi)(x > high), splat(std::numeric_limits<float>::infinity()), result);
    result = select((vi)(x < low), (vf){}, result);
    return select((vi)(x != x), x, result);
#endif
}
// 2^x for x up to 127, within 2 units in the last place; exactly 1 for 0, exactly 0 below -126; NaN for NaN. Half the
// work of `vexp`; for a softmax, whose arguments have their maximum subtracted.
INLINE vf vexp2(vf x) {
    const vf low = splat(-126.0f), magic = splat(12582912.0f);
    vf t = x + magic;
    vf n = t - magic;
    vf r = x - n;
    vf p = splat(1.53458120e-4f);
    p = p * r + 1.33999314e-3f;
    p = p * r + 9.61848896e-3f;
    p = p * r + 5.55032878e-2f;
    p = p * r + 2.40226469e-1f;
    p = p * r + 6.93147206e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
    vf result = (vf)((vi)p + (((vi)t - (vi)magic) << 23));
    result = (vf)((vi)result & ~(vi)(x < low));
    return select((vi)(x != x), x, result);
#endif
}
// Within 2 units in the last place above -85; below, where it would be 1e-37 or less, 1e-37 or less.
INLINE vf vsigmoid(vf x) {
#if defined(__AVX512F__)
    // A 14-bit approximation and one Newton step take a third of the time of a division.
    __m512 d = (__m512)(1.0f + (vf)_mm512_min_ps(_mm512_set1_ps(1e37f), (__m512)vexp(-x)));
    vf r = (vf)_mm512_rcp14_ps(d);
    return r + r * (1.0f - (vf)d * r);
#else
    return 1.0f / (1.0f + vexp(-x));
#endif
}
