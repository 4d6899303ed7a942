"""One kind of token mixer a file."""
