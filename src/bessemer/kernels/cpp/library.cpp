// What the loader asks first, and the way to torch's threads.
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

// 0 if this process may run the code of this library; of AMX the kernel has to be asked.
extern "C" EXPORT int bessemer_start() {
#if defined(__linux__) && defined(__AMX_BF16__)
    constexpr int request_permission = 0x1023, tile_data = 18;
    if (syscall(SYS_arch_prctl, request_permission, tile_data)) return 1;
#endif
    return 0;
}

// 1 where BF16 operands go through tiles.
extern "C" EXPORT int bessemer_has_tiles() {
#if defined(__AMX_BF16__) || defined(BESSEMER_EMULATE_TILES)
    return 1;
#else
    return 0;
#endif
}
