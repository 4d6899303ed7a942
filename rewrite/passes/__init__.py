"""The stages of the compiler, in the order the pipeline calls them."""
