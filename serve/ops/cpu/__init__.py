"""CPU backend of the kernels: JIT compiler and its cache, threads, GEMM, Winograd."""
