// Products of matrix blocks that fit a core's cache, C = A B or C += A B with C in float32, in two forms with one
// interface:
//
//     FloatGemm   operands in float32, on the vector units
//     Bf16Gemm    operands in BF16, on the tiles of AMX (or their emulation, which a test compiles), or where there are
//                 none by vdpbf16ps, which adds the products of two pairs to each lane of a vector
//
// A is [M, K], row-major, written by `pack_a` or the caller; B is [K, N], written by `pack_b`. Every element of C is a
// sum over k in ascending order, whatever M and N are, so a row's result does not depend on the other rows.
#pragma once

#include "parallel.hpp"

struct FloatGemm {
    typedef float Element;
    static constexpr int KB = 1;  // K of a packed A is a multiple of this, padded with zeros
    static constexpr int NV = 2, NR = NV * W;  // columns per register block
#if defined(__AVX2__) && !defined(__AVX512F__)
    static constexpr int MR = 6;  // 16 registers
#else
    static constexpr int MR = 12;  // 32 registers
#endif

    static i64 a_width(i64 K) { return K; }
    static i64 a_rows(i64 M) { return M; }
    static i64 b_size(i64 K, i64 N) { return K * round_up(N, NR); }

    // A as `multiply` reads it: A(m, k) = p[m * rs + k * cs].
    struct Left {
        const float* p;
        i64 rs, cs;
    };
    static Left left(const float* a, i64 lda) { return {a, lda, 1}; }
    // A(m, k) = src[k * ld + m]; does not use `room`.
    static Left left_transposed(float* room, const float* src, i64 M, i64 K, i64 ld) { return {src, 1, ld}; }

    // B from src(k, n) = src[k * rs + n * cs], where rs or cs is 1: panels of NR columns, [N / NR][K][NR].
    template <class S>
    static void pack_b(float* to, const S* src, i64 K, i64 N, i64 rs, i64 cs) {
        for (i64 n = 0; n < N; n += NR, to += K * NR) {
            i64 columns = least(NR, N - n);
            if (cs == 1 && columns == NR) {
                for (i64 k = 0; k < K; ++k)
                    for (int j = 0; j < NV; ++j) store(to + k * NR + j * W, load(src + k * rs + n + j * W));
            } else if (rs == 1 && columns == NR) {
                i64 k = 0;
                for (; k + W <= K; k += W)
                    for (int j = 0; j < NV; ++j) {
                        vf block[W];
                        for (int i = 0; i < W; ++i) block[i] = load(src + (n + j * W + i) * cs + k);
                        transpose(block);
                        for (int i = 0; i < W; ++i) store(to + (k + i) * NR + j * W, block[i]);
                    }
                for (; k < K; ++k)
                    for (int j = 0; j < NR; ++j) to[k * NR + j] = widen(src[(n + j) * cs + k]);
            } else {
                for (i64 k = 0; k < K; ++k)
                    for (i64 j = 0; j < NR; ++j) to[k * NR + j] = j < columns ? widen(src[k * rs + (n + j) * cs]) : 0.0f;
            }
        }
    }

    // B from K rows; row(k) is the address of the k-th.
    template <class Row>
    static void pack_b_rows(float* to, i64 K, i64 N, Row row) {
        for (i64 k = 0; k < K; ++k) {
            auto src = row(k);
            for (i64 n = 0; n < N; n += W) {
                float* at = to + n / NR * K * NR + k * NR + n % NR;
                store(at, N - n >= W ? load(src + n) : load_part(src + n, (int)(N - n)));
            }
            for (i64 n = round_up(N, W); n < round_up(N, NR); n += W)
                store(to + n / NR * K * NR + k * NR + n % NR, (vf){});
        }
    }

    // A from src(m, k) = src[m * rs + k * cs], row-major with rows of a_width(K).
    template <class S>
    static void pack_a(float* to, const S* src, i64 M, i64 K, i64 rs, i64 cs) {
        for (i64 m = 0; m < M; ++m) {
            i64 k = 0;
            if (cs == 1)
                for (; k + W <= K; k += W) store(to + m * K + k, load(src + m * rs + k));
            for (; k < K; ++k) to[m * K + k] = widen(src[m * rs + k * cs]);
        }
    }

    // C [M, N] with rows of ldc, from A(m, k) = a[m * ars + k * acs] and a packed B.
    static void multiply(i64 M, i64 N, i64 K, const float* a, i64 ars, i64 acs, const float* b, float* c, i64 ldc,
                         bool add);
    static void multiply(i64 M, i64 N, i64 K, const float* a, i64 lda, const float* b, float* c, i64 ldc, bool add) {
        multiply(M, N, K, a, lda, 1, b, c, ldc, add);
    }
    // The same with B row-major, in place. Reads whole vectors at the end of its rows, so ldb >= N rounded up to W.
    // `next`: where the caller reads next.
    static void multiply_rows(i64 M, i64 N, i64 K, const float* a, i64 ars, i64 acs, const float* b, i64 ldb, float* c,
                              i64 ldc, bool add, const void* next = nullptr);
    static void multiply(i64 M, i64 N, i64 K, Left a, const float* b, float* c, i64 ldc, bool add) {
        multiply(M, N, K, a.p, a.rs, a.cs, b, c, ldc, add);
    }

    struct Session {};  // a thread's state while it multiplies
};

#if defined(__AMX_BF16__) || defined(BESSEMER_EMULATE_TILES)
#define BESSEMER_TILES 1
#endif
#if defined(BESSEMER_TILES) || defined(__AVX512BF16__)
#define BESSEMER_BF16 1

#if defined(BESSEMER_EMULATE_TILES)
// The AMX instructions in plain C++, for machines without them.
namespace tiles {
inline thread_local char memory[8][16][64];
INLINE void load(int t, const void* p, i64 stride) {
    for (int r = 0; r < 16; ++r) memcpy(memory[t][r], (const char*)p + r * stride, 64);
}
INLINE void store(int t, void* p, i64 stride) {
    for (int r = 0; r < 16; ++r) memcpy((char*)p + r * stride, memory[t][r], 64);
}
INLINE void zero(int t) { memset(memory[t], 0, sizeof memory[t]); }
inline void multiply(int c, int a, int b) {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            float total;
            memcpy(&total, &memory[c][m][4 * n], 4);
            for (int k = 0; k < 32; ++k) {
                bf16 x, y;
                memcpy(&x, &memory[a][m][2 * k], 2);
                memcpy(&y, &memory[b][k / 2][4 * n + 2 * (k % 2)], 2);
                total += widen(x) * widen(y);
            }
            memcpy(&memory[c][m][4 * n], &total, 4);
        }
}
INLINE void configure() {}
INLINE void release() {}
}  // namespace tiles
#define TILE_LOAD(t, p, stride) tiles::load(t, p, stride)
#define TILE_STORE(t, p, stride) tiles::store(t, p, stride)
#define TILE_ZERO(t) tiles::zero(t)
#define TILE_MULTIPLY(c, a, b) tiles::multiply(c, a, b)
#elif defined(BESSEMER_TILES)
namespace tiles {
INLINE void configure() {
    struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
}
INLINE void release() { _tile_release(); }
}  // namespace tiles
// GCC does not know that these instructions read and write memory.
#define TILE_LOAD(t, p, stride)              \
    do {                                     \
        asm volatile("" ::: "memory");       \
        _tile_loadd(t, (const void*)(p), stride); \
    } while (0)
#define TILE_STORE(t, p, stride)             \
    do {                                     \
        _tile_stored(t, (void*)(p), stride); \
        asm volatile("" ::: "memory");       \
    } while (0)
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

struct Bf16Gemm {
    typedef bf16 Element;
    static constexpr int KB = 32;
    static constexpr int NR = 32;  // columns per register block

    static i64 a_width(i64 K) { return round_up(K, 32); }
    static i64 a_rows(i64 M) { return round_up(M, 16); }  // rows of a packed A, the last ones zero
    static i64 b_size(i64 K, i64 N) { return round_up(K, 32) * round_up(N, 16); }

    // A as `multiply` reads it: rows of ld elements.
    struct Left {
        const bf16* p;
        i64 ld;
    };
    static Left left(const bf16* a, i64 lda) { return {a, lda}; }
    // A(m, k) = src[k * ld + m], written to `room`, of a_rows(M) * a_width(K) elements.
    static Left left_transposed(bf16* room, const bf16* src, i64 M, i64 K, i64 ld) {
        pack_a(room, src, M, K, 1, ld);
        return {room, a_width(K)};
    }

    // B from src(k, n) = src[k * rs + n * cs]: panels of 16 columns, [N / 16][K / 2][16][2], padded with zeros.
    template <class S>
    static void pack_b(bf16* to, const S* src, i64 K, i64 N, i64 rs, i64 cs) {
        i64 KP = round_up(K, 32);
        for (i64 n = 0; n < N; n += 16, to += KP * 16) {
            i64 k = 0;
            if constexpr (sizeof(S) == 2) {
                if (cs == 1 && N - n >= 16)
                    for (; k + 2 <= K; k += 2)
                        for (i64 j = 0; j < 16; j += W)
                            store_pairs(to + k * 16 + 2 * j, pairs(src + k * rs + n + j, src + (k + 1) * rs + n + j));
                if (rs == 1 && N - n >= 16)
                    for (; k + 2 * W <= K; k += 2 * W)
                        for (i64 j = 0; j < 16; j += W) {
                            vf block[W];
                            for (int i = 0; i < W; ++i) block[i] = load((const float*)(src + (n + j + i) * cs + k));
                            transpose(block);
                            for (int i = 0; i < W; ++i) store_pairs(to + (k + 2 * i) * 16 + 2 * j, (vu)block[i]);
                        }
            }
            for (; k < KP; ++k)
                for (i64 j = 0; j < 16; ++j) {
                    bool inside = k < K && n + j < N;
                    to[(k / 2) * 32 + 2 * j + k % 2] = inside ? as_bf16(src[k * rs + (n + j) * cs]) : bf16{0};
                }
        }
    }
    // B from K rows; row(k) is the address of the k-th.
    template <class Row>
    static void pack_b_rows(bf16* to, i64 K, i64 N, Row row) {
        i64 KP = round_up(K, 32), panel = KP * 16;
        for (i64 k = 0; k < KP; k += 2) {
            const bf16 *even = k < K ? row(k) : nullptr, *odd = k + 1 < K ? row(k + 1) : nullptr;
            for (i64 n = 0; n < N; n += 16) {
                bf16* at = to + n / 16 * panel + k * 16;
                if (odd && N - n >= 16) {
                    for (i64 j = 0; j < 16; j += W) store_pairs(at + 2 * j, pairs(even + n + j, odd + n + j));
                } else {
                    for (i64 j = 0; j < 16; ++j) {
                        at[2 * j] = even && n + j < N ? even[n + j] : bf16{0};
                        at[2 * j + 1] = odd && n + j < N ? odd[n + j] : bf16{0};
                    }
                }
            }
        }
    }
    // A from src(m, k) = src[m * rs + k * cs]: rows of a_width(K), a_rows(M) of them, padded with zeros.
    template <class S>
    static void pack_a(bf16* to, const S* src, i64 M, i64 K, i64 rs, i64 cs) {
        i64 KP = round_up(K, 32), MP = a_rows(M);
        i64 done_m = 0, done_k = 0;  // the part covered by whole vectors
        if constexpr (sizeof(S) == 2)
            if (rs == 1) {
                done_m = M / W * W, done_k = K / (2 * W) * (2 * W);
                for (i64 k = 0; k < done_k; k += 2 * W) {
                    i64 m = 0;
#if defined(__AVX512BW__)
                    for (; m + 2 * W <= M; m += 2 * W) transpose_lines(to + m * KP + k, KP, src + k * cs + m, cs);
#endif
                    for (; m < done_m; m += W) {
                        vf block[W];
                        for (int i = 0; i < W; ++i)
                            block[i] = (vf)pairs(src + (k + 2 * i) * cs + m, src + (k + 2 * i + 1) * cs + m);
                        transpose(block);
                        for (int i = 0; i < W; ++i) store_pairs(to + (m + i) * KP + k, (vu)block[i]);
                    }
                }
            }
        for (i64 m = 0; m < MP; ++m)
            for (i64 k = m < done_m ? done_k : 0; k < KP; ++k)
                to[m * KP + k] = m < M && k < K ? as_bf16(src[m * rs + k * cs]) : bf16{0};
    }

    // C [M, N] with rows of ldc. A has a_rows(M) readable rows of lda elements, the first K rounded up to 32 defined.
    static void multiply(i64 M, i64 N, i64 K, const bf16* a, i64 lda, const bf16* b, float* c, i64 ldc, bool add)
#if defined(BESSEMER_TILES)
    {
        i64 KP = round_up(K, 32), panel = KP * 16;
        for (i64 n = 0; n < N; n += 32)
            for (i64 m = 0; m < M; m += 32) {
                bool two_m = M - m > 16, two_n = N - n > 16;
                const bf16 *a0 = a + m * lda, *a1 = a0 + 16 * lda, *b0 = b + n / 16 * panel, *b1 = b0 + panel;
                float* to = c + m * ldc + n;
                bool whole = M - m >= (two_m ? 32 : 16) && N - n >= (two_n ? 32 : 16);
                alignas(64) float part[32 * 32];
                float* out = whole ? to : part;
                i64 ld = whole ? ldc : 32;
                i64 rows = least(32, M - m), columns = least(32, N - n);
                if (add && !whole) {
                    for (i64 i = 0; i < rows; ++i) memcpy(part + i * 32, to + i * ldc, columns * 4);
                }
                if (add) {
                    TILE_LOAD(0, out, ld * 4);
                    if (two_n) TILE_LOAD(1, out + 16, ld * 4);
                    if (two_m) TILE_LOAD(2, out + 16 * ld, ld * 4);
                    if (two_m && two_n) TILE_LOAD(3, out + 16 * ld + 16, ld * 4);
                } else {
                    TILE_ZERO(0);
                    TILE_ZERO(1);
                    TILE_ZERO(2);
                    TILE_ZERO(3);
                }
                if (two_m && two_n) {
                    for (i64 k = 0; k < KP; k += 32) {
                        TILE_LOAD(4, a0 + k, lda * 2);
                        TILE_LOAD(6, b0 + k * 16, 64);
                        TILE_MULTIPLY(0, 4, 6);
                        TILE_LOAD(7, b1 + k * 16, 64);
                        TILE_MULTIPLY(1, 4, 7);
                        TILE_LOAD(5, a1 + k, lda * 2);
                        TILE_MULTIPLY(2, 5, 6);
                        TILE_MULTIPLY(3, 5, 7);
                    }
                } else {
                    for (i64 k = 0; k < KP; k += 32) {
                        TILE_LOAD(4, a0 + k, lda * 2);
                        TILE_LOAD(6, b0 + k * 16, 64);
                        TILE_MULTIPLY(0, 4, 6);
                        if (two_n) {
                            TILE_LOAD(7, b1 + k * 16, 64);
                            TILE_MULTIPLY(1, 4, 7);
                        }
                        if (two_m) {
                            TILE_LOAD(5, a1 + k, lda * 2);
                            TILE_MULTIPLY(2, 5, 6);
                        }
                    }
                }
                TILE_STORE(0, out, ld * 4);
                if (two_n) TILE_STORE(1, out + 16, ld * 4);
                if (two_m) TILE_STORE(2, out + 16 * ld, ld * 4);
                if (two_m && two_n) TILE_STORE(3, out + 16 * ld + 16, ld * 4);
                if (!whole)
                    for (i64 i = 0; i < rows; ++i) memcpy(to + i * ldc, part + i * 32, columns * 4);
            }
    }
#else
        ;  // gemm.cpp
#endif

    static void multiply(i64 M, i64 N, i64 K, Left a, const bf16* b, float* c, i64 ldc, bool add) {
        multiply(M, N, K, a.p, a.ld, b, c, ldc, add);
    }

    // This thread's tile configuration; released at the end, since oneDNN shares it.
#if defined(BESSEMER_TILES)
    struct Session {
        Session() { tiles::configure(); }
        ~Session() { tiles::release(); }
    };
#else
    struct Session {};
#endif

   private:
    static INLINE void store_pairs(bf16* p, vu x) { *(vf_mem*)p = (vf)x; }
#if defined(__AVX512BW__)
    // Transposes 32 x 32 elements, whole cache lines at a time. Interleaved in lanes of 16 bytes, pair p of 16 belongs
    // to column 8 (p / 4) + p % 4, or 4 further in the upper half.
    static void transpose_lines(bf16* to, i64 ldt, const bf16* from, i64 ldf) {
        vf low[16], high[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            __m512i even = _mm512_loadu_si512(from + 2 * i * ldf), odd = _mm512_loadu_si512(from + (2 * i + 1) * ldf);
            low[i] = (vf)_mm512_unpacklo_epi16(even, odd), high[i] = (vf)_mm512_unpackhi_epi16(even, odd);
        }
        transpose(low);
#pragma GCC unroll 16
        for (int p = 0; p < 16; ++p) store_pairs(to + (p / 4 * 8 + p % 4) * ldt, (vu)low[p]);
        transpose(high);
#pragma GCC unroll 16
        for (int p = 0; p < 16; ++p) store_pairs(to + (p / 4 * 8 + p % 4 + 4) * ldt, (vu)high[p]);
    }
#endif
    static INLINE bf16 as_bf16(bf16 x) { return x; }
    static INLINE bf16 as_bf16(float x) { return narrow(x); }
};
#endif
