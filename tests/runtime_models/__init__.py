"""Tiny models for tests of the runtime: each as mlx_lm would have it, and as it is rewritten."""
