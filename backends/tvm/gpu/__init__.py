"""The backend for NVIDIA GPUs: plain loops, which TVM's rules for GPUs map to threads, compiled by nvcc."""
