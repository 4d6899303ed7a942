"""Rewritten mlx_lm models (build output) and their committed manifests."""
