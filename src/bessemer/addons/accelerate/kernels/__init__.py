"""Fused CPU kernels in C++, built at first use with the machine's compiler. Without a compiler, or with
BESSEMER_KERNELS=off, the torch code next to every call computes the same results up to rounding.

`build` compiles `cpp/` and caches the library; `library` loads it and reports what it found. The other modules are the
kernels, one for each part of the network: `serves(...)` says whether the kernel takes a call, and the functions next to
it compute. The `triton_*` modules are GPU kernels.
"""
