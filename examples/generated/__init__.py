"""Rewritten models (build output) and their manifests."""
