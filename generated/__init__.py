"""Rewritten models (build output) and their committed manifests."""
