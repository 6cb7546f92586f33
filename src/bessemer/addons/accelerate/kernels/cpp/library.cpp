// What the loader calls first, and access to torch's threads.
#include "parallel.hpp"

#include <dlfcn.h>

#if defined(__linux__) && defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

void on_threads(int threads, void (*work)(void*), void* data) {
    typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
    static const Parallel parallel = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (parallel)
        parallel(work, data, (unsigned)threads, 0);
    else
        work(data);
}

void Buffer::grow(size_t needed) {
    free(memory);
    bytes = needed + needed / 4 / 64 * 64;
    memory = aligned_alloc(64, bytes);
    if (!memory) abort();
}

// 0 if this process may run this library's code; permission for AMX must be requested from the kernel.
extern "C" EXPORT int bessemer_start() {
#if defined(__linux__) && defined(__AMX_BF16__)
    constexpr int request_permission = 0x1023, tile_data = 18;
    if (syscall(SYS_arch_prctl, request_permission, tile_data)) return 1;
#endif
    return 0;
}

extern "C" void product_float32(i64, i64, i64, const float*, i64, i64, const float*, i64, i64, float*, i64, i64, i64);
extern "C" void product_bfloat16(i64, i64, i64, const bf16*, i64, i64, const bf16*, i64, i64, float*, i64, i64, i64);

// Called to try a new library: 0 if products of small integers are exact, 2 if not.
extern "C" EXPORT int bessemer_check() {
    if (bessemer_start()) return 0;  // cannot be tried here
    constexpr int M = 13, N = 37, K = 35;
    float a[M * K], b[K * N], c[M * N];
    bf16 narrow_a[M * K], narrow_b[K * N];
    for (int i = 0; i < M * K; ++i) narrow_a[i] = narrow(a[i] = (float)(i % 15 - 7));
    for (int i = 0; i < K * N; ++i) narrow_b[i] = narrow(b[i] = (float)(i % 13 - 6));
    for (int pass = 0; pass < 2; ++pass) {
        if (pass == 0)
            product_float32(M, N, K, a, K, 1, b, N, 1, c, N, 0, 1);
        else
            product_bfloat16(M, N, K, narrow_a, K, 1, narrow_b, N, 1, c, N, 0, 1);
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) {
                int exact = 0;
                for (int k = 0; k < K; ++k) exact += ((m * K + k) % 15 - 7) * ((k * N + n) % 13 - 6);
                if (c[m * N + n] != (float)exact) return 2;
            }
    }
    return 0;
}
