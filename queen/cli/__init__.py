"""The ``queen-trio`` command: one file per command; ``main`` only parses."""
