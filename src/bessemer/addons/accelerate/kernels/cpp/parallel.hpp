// Runs tasks on torch's threads, and provides buffers that persist from call to call.
#pragma once

#include <atomic>
#include <cstdlib>

#include "simd.hpp"

// Runs work(data, thread) on `threads` threads of torch's own OpenMP pool, or on this thread if there is none.
void on_threads(int threads, void (*work)(void*), void* data);

// A separate function, because a task's body is compiled again in every loop that contains it.
template <class Task>
__attribute__((noinline)) void run_tasks(const Task& task, i64 first, i64 last) {
    for (i64 i = first; i < last; ++i) task(i);
}

// Runs task(i) for every i below n. Any thread may run a task, so a task must write only its own data.
template <class Task>
void parallel(i64 n, int threads, const Task& task) {
    if (threads > n) threads = (int)n;
    if (threads <= 1) {
        run_tasks(task, 0, n);
        return;
    }
    struct Shared {
        const Task* task;
        i64 n;
        std::atomic<i64> next;
    } shared{&task, n, {0}};
    on_threads(
        threads,
        [](void* data) {
            auto* s = (Shared*)data;
            for (i64 i; (i = s->next.fetch_add(1)) < s->n;) run_tasks(*s->task, i, i + 1);
        },
        &shared);
}

struct Buffer {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Buffer() { free(memory); }
    void grow(size_t needed);
};

// This thread's buffer for n elements, aligned to 64 bytes, with undefined content. Every SLOT has its own buffer; a
// later call with the same slot may move it.
template <int SLOT, class T>
T* scratch(i64 n) {
    static thread_local Buffer buffer;
    size_t needed = ((size_t)n * sizeof(T) + 127) / 64 * 64;
    if (needed > buffer.bytes) buffer.grow(needed);
    return (T*)buffer.memory;
}

INLINE i64 round_up(i64 x, i64 multiple) { return (x + multiple - 1) / multiple * multiple; }
INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
