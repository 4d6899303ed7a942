"""The CUDA prelude."""
