"""How process supervisors compare: the same harm done to gunicorn, uvicorn, hypercorn and ours, and what it came to.

    python -m perf.supervision

Makes a virtual environment with the peers from the package index. What is served is a tiny application, the same for
all (asgi_app.py, wsgi_app.py); what is done to it is in harm.py.
"""
