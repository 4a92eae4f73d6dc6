"""Answers that stay open: large bodies sent as fast as the client reads them."""
