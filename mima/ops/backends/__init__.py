"""What serves the operators: plain PyTorch, C++ and CUDA; Triton's kernels are `mima.kernels`."""
