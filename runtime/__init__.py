"""Runs rewritten models; never imports the compiler."""
