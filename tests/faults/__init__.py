"""Faults thrown at a running server under load, and checkers for what must hold in spite of them.

    python -m tests.faults --help

Real processes, the real PostgreSQL, a load of producers and consumers that write down what they were told (history.py),
and judges that read it afterwards (checkers.py). `nox -s faults` runs it; `nox -s tests` does not.
"""
