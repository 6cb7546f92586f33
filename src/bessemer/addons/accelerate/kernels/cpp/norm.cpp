// RMSNorm forward and backward: y = w x / sqrt(mean(x^2) + eps), in float32 whatever the dtype of x.
#include "parallel.hpp"

namespace {

constexpr i64 BLOCK = 64;  // rows per task; fixed, so that sums over rows do not depend on the number of threads

template <class T>
INLINE float inverse_rms(const T* x, i64 D, float eps) {
    vf square[4] = {};
    i64 d = 0;
    for (; d + 4 * W <= D; d += 4 * W)
        for (int j = 0; j < 4; ++j) {
            vf v = load(x + d + j * W);
            square[j] += v * v;
        }
    for (; d < D; d += W) {
        vf v = D - d >= W ? load(x + d) : load_part(x + d, (int)(D - d));
        square[0] += v * v;
    }
    float total = sum((square[0] + square[1]) + (square[2] + square[3]));
    return 1.0f / __builtin_sqrtf(total / (float)D + eps);
}

template <class T>
void forward(const T* x, i64 stride, const float* w, T* y, i64 N, i64 D, float eps, int threads) {
    parallel((N + BLOCK - 1) / BLOCK, threads, [&](i64 block) {
        for (i64 n = block * BLOCK; n < least(N, (block + 1) * BLOCK); ++n) {
            const T* row = x + n * stride;
            T* out = y + n * D;
            vf scale = splat(inverse_rms(row, D, eps));
            each_vector(D, [&](i64 d, int left) {
                store_some(out + d, load_some(row + d, left) * scale * load_some(w + d, left), left);
            });
        }
    });
}

// dx = s (w dy - z mean(w dy z)) with z = s x; dw is summed per block in `partial`, then over blocks in order.
template <class T>
void backward(const T* dy, const T* x, i64 stride, const float* w, T* dx, float* dw, float* partial, i64 N, i64 D, float eps, int threads) {
    i64 blocks = (N + BLOCK - 1) / BLOCK;
    parallel(blocks, threads, [&](i64 block) {
        float* mine = partial + block * D;
        memset(mine, 0, D * sizeof(float));
        for (i64 n = block * BLOCK; n < least(N, (block + 1) * BLOCK); ++n) {
            const T *row = x + n * stride, *grad = dy + n * D;
            T* out = dx + n * D;
            float s = inverse_rms(row, D, eps);
            vf scale = splat(s), inner = {};
            each_vector(D, [&](i64 d, int left) {
                vf gz = load_some(grad + d, left) * (load_some(row + d, left) * scale);
                inner += load_some(w + d, left) * gz;
                store_some(mine + d, load_some(mine + d, left) + gz, left);
            });
            vf mean = splat(sum(inner) / (float)D);
            each_vector(D, [&](i64 d, int left) {
                vf z = load_some(row + d, left) * scale, g = load_some(grad + d, left);
                store_some(out + d, (load_some(w + d, left) * g - z * mean) * scale, left);
            });
        }
    });
    memset(dw, 0, D * sizeof(float));
    for (i64 block = 0; block < blocks; ++block)
        for (i64 d = 0; d < D; ++d) dw[d] += partial[block * D + d];
}

}  // namespace

#define FUNCTIONS(T, suffix)                                                                                          \
    extern "C" EXPORT void rms_norm_##suffix(const T* x, i64 stride, const float* w, T* y, i64 N, i64 D, float eps,         \
                                      i64 threads) {                                                                  \
        forward(x, stride, w, y, N, D, eps, (int)threads);                                                            \
    }                                                                                                                 \
    extern "C" EXPORT void rms_norm_backward_##suffix(const T* dy, const T* x, i64 stride, const float* w, T* dx, float* dw, \
                                               float* partial, i64 N, i64 D, float eps, i64 threads) {                \
        backward(dy, x, stride, w, dx, dw, partial, N, D, eps, (int)threads);                                         \
    }
FUNCTIONS(float, float32)
FUNCTIONS(bf16, bfloat16)
