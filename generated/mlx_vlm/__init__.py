"""Rewritten language models of mlx_vlm (build output) and their committed manifests."""
