"""Text the compiler inserts."""
