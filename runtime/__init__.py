"""Runs rewritten models; never imports the compiler."""

# Of the contract between generated files and the runtime; the compiler writes the number it knows
# into each manifest, and `load` compares.
API = 1
