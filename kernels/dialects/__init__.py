"""How the Metal text is run where there is no Metal."""
