"""Groups of ranks: the Group seam, its members over MPI and NCCL, and the kernels of sums between GPUs."""
