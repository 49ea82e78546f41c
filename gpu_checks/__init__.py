"""What can be proven about GPU kernels without a GPU: see docs/gpu.md."""
