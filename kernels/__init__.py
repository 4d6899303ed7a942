"""Templated Metal kernels and the ops that call them."""
