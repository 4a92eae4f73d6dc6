"""Real processes, sockets and PostgreSQL: what an operator sees, and what survives being killed."""
