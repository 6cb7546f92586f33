// Repeats recorded calls of kernels with a library built for another processor: replay LIBRARY CALLS RESULTS.
// `kernels_arm.py` writes CALLS and reads RESULTS; numbers are little-endian.
//
//     call     := name "\0" signature "\0" n, then n times a memory, then an argument for every letter
//     memory   := bytes, content, n, then n times { place of an address in it, number of the memory, offset }
//     argument := p: number of the memory or -1, offset; i: int64; f, d: double
//
// RESULTS holds the content of all memories after each call. A write past the end of one is an error.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

typedef int64_t i64;

#if defined(__aarch64__)
constexpr int INTEGERS = 8;  // arguments in general registers
#else
constexpr int INTEGERS = 6;
#endif
constexpr int FLOATS = 8, STACK = 40, GUARD = 256;

// With all registers taken, the others lie on the stack in order, 8 bytes each: so on Linux on both processors.
#if defined(__aarch64__)
#define GENERAL r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]
typedef void (*Function)(i64, i64, i64, i64, i64, i64, i64, i64, double, double, double, double, double, double, double,
                         double, ...);
#else
#define GENERAL r[0], r[1], r[2], r[3], r[4], r[5]
typedef void (*Function)(i64, i64, i64, i64, i64, i64, double, double, double, double, double, double, double, double, ...);
#endif
#define FIVE(i) s[i], s[i + 1], s[i + 2], s[i + 3], s[i + 4]

static std::vector<char> input;
static size_t at;

template <class T>
static T take() {
    T x;
    memcpy(&x, &input[at], sizeof x);
    at += sizeof x;
    return x;
}
static std::string text() {
    std::string s(&input[at]);
    at += s.size() + 1;
    return s;
}

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
    FILE *from = fopen(arguments[2], "rb"), *to = fopen(arguments[3], "wb");
    if (!from || !to) return perror("files"), 1;
    fseek(from, 0, SEEK_END);
    input.resize((size_t)ftell(from));
    rewind(from);
    if (fread(input.data(), 1, input.size(), from) != input.size()) return perror("calls"), 1;
    while (at < input.size()) {
        std::string name = text(), signature = text();
        std::vector<char*> memory((size_t)take<i64>());
        std::vector<i64> bytes;
        struct Address {
            char** holder;
            i64 place, number, offset;
        };
        std::vector<Address> addresses;
        for (char*& m : memory) {
            bytes.push_back(take<i64>());
            m = (char*)aligned_alloc(64, (size_t)(bytes.back() + GUARD + 63) / 64 * 64);
            memcpy(m, &input[at], (size_t)bytes.back());
            memset(m + bytes.back(), 0xa5, GUARD);
            at += (size_t)bytes.back();
            for (i64 left = take<i64>(); left > 0; --left) {
                i64 place = take<i64>(), number = take<i64>(), offset = take<i64>();
                addresses.push_back({&m, place, number, offset});
            }
        }
        for (auto& a : addresses) {
            char* target = memory[(size_t)a.number] + a.offset;
            memcpy(*a.holder + 8 * a.place, &target, 8);
        }
        i64 r[8] = {}, s[STACK] = {};
        double f[FLOATS] = {};
        int integers = 0, floats = 0, stacked = 0;
        for (char letter : signature) {
            i64 value;
            if (letter == 'p') {
                i64 number = take<i64>(), offset = take<i64>();
                value = number < 0 ? 0 : (i64)(memory[(size_t)number] + offset);
            } else if (letter == 'i') {
                value = take<i64>();
            } else {
                double x = take<double>();
                float single = (float)x;
                memcpy(&value, &x, 8);
                if (letter == 'f') value = 0, memcpy(&value, &single, 4);
            }
            bool is_float = letter == 'f' || letter == 'd';
            if (is_float && floats < FLOATS)
                memcpy(&f[floats++], &value, 8);
            else if (!is_float && integers < INTEGERS)
                r[integers++] = value;
            else if (stacked < STACK)
                s[stacked++] = value;
            else
                return fprintf(stderr, "%s has too many arguments\n", name.c_str()), 1;
        }
        Function function = (Function)dlsym(library, name.c_str());
        if (!function) return fprintf(stderr, "%s\n", dlerror()), 1;
        function(GENERAL, f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], FIVE(0), FIVE(5), FIVE(10), FIVE(15), FIVE(20),
                 FIVE(25), FIVE(30), FIVE(35));
        for (size_t i = 0; i < memory.size(); ++i) {
            for (int j = 0; j < GUARD; ++j)
                if (memory[i][bytes[i] + j] != (char)0xa5)
                    return fprintf(stderr, "%s writes past the end of memory %zu\n", name.c_str(), i), 1;
            fwrite(memory[i], 1, (size_t)bytes[i], to);
            free(memory[i]);
        }
    }
    return fclose(to) ? 1 : 0;
}
