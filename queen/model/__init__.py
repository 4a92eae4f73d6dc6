"""The nouns of the broker: frozen values, no I/O."""
