// RMSNorm forward and backward: y = w x / sqrt(mean(x^2) + eps), in float32 whatever the dtype of x.
#include "parallel.hpp"

namespace {

constexpr i64 BLOCK = 64;  // rows of a task; fixed, so that sums over rows do not depend on the number of threads

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
            i64 d = 0;
            for (; d + W <= D; d += W) store(out + d, load(row + d) * scale * load(w + d));
            if (d < D) {
                int left = (int)(D - d);
                store_part(out + d, load_part(row + d, left) * scale * load_part(w + d, left), left);
            }
        }
    });
}

// dx = s (w dy - z mean(w dy z)) with z = s x; dw is added up block by block in `partial`, then in the blocks' order.
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
            for (i64 d = 0; d < D; d += W) {
                int left = (int)least(W, D - d);
                bool whole = left == W;
                vf g = whole ? load(grad + d) : load_part(grad + d, left);
                vf z = (whole ? load(row + d) : load_part(row + d, left)) * scale;
                vf gain = whole ? load(w + d) : load_part(w + d, left);
                vf gz = g * z;
                inner += gain * gz;
                if (whole)
                    store(mine + d, load(mine + d) + gz);
                else
                    store_part(mine + d, load_part(mine + d, left) + gz, left);
            }
            vf mean = splat(sum(inner) / (float)D);
            for (i64 d = 0; d < D; d += W) {
                int left = (int)least(W, D - d);
                bool whole = left == W;
                vf g = whole ? load(grad + d) : load_part(grad + d, left);
                vf z = (whole ? load(row + d) : load_part(row + d, left)) * scale;
                vf gain = whole ? load(w + d) : load_part(w + d, left);
                vf result = (gain * g - z * mean) * scale;
                if (whole)
                    store(out + d, result);
                else
                    store_part(out + d, result, left);
            }
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
