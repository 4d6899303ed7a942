"""The CPU runner."""
