// The interface of decode.cpp.
#pragma once

#include "simd.hpp"

// `engine.kernel_steps` writes these in this order.
struct Shape {
    i64 dim, heads, q_rank, latent, rope, nope, value, experts, active, groups, kept_groups, rated, inner, shared, dense, vocab, softmax, normed;
};
struct Factors {
    double eps, latent_eps, scale, route;
};

#define DECODE_STEP(T, suffix)                                                                                           \
    extern "C" EXPORT void decode_step_##suffix(                                                                         \
        const i64* shape, const double* factors, const i64* layers, i64 n_layers, const i64* ends, const i64* token,     \
        const T* hidden, const i64* begin, const i64* base, i64 B, const i64* table, i64 width, const float* turns,      \
        const i64* expand, const i64* pick, i64 M, T* raw, T* state, float* logits, i64* record, i64 threads, i64* work)
DECODE_STEP(float, float32);
DECODE_STEP(bf16, bfloat16);
