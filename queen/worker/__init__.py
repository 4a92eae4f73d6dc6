"""One worker process: the code it begins with (``python -m queen.worker``), and how it serves the app."""
