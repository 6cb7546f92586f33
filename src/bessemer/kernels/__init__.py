"""Fused kernels for CPUs in C++, built at first use with the machine's compiler. Without one, or with
BESSEMER_KERNELS=off, the torch code next to every call serves it, with the same results up to rounding.

`build` compiles `cpp/` and caches the library, `library` loads it and says what it found. The other modules are the
kernels, one for each part of the network: a function `serves(...)` says whether a call fits, and the functions beside
it compute.
"""
