"""Groups of ranks: the Group protocol, its implementations over MPI and NCCL, and the kernels of sums between GPUs."""
