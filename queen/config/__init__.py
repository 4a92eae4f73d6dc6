"""Settings: read once at start, handed down as a frozen value."""
