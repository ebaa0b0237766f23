"""How kernels run on a CPU: compiler, cache of machine code, threads, GEMM, Winograd."""
