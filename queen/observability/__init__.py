"""Logs and counters: passive, calls nobody back."""
