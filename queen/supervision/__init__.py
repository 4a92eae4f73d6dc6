"""The parts of the supervisor (queen/supervisor.py): what keeps one child running, and what all of them have in common.

No HTTP, no SQL, no message and none of the app is here: what is small is hard to crash.

    Supervisor.run ── signals, status line                          ../supervisor.py
      └── database: PostgreSQL, if it is ours to run                database.py
            └── Slot 0 … N-1: a listening socket and one worker     slot.py, listeners.py
                              process after another

PostgreSQL is the last to stop: workers need it to finish what they have begun. What all children have in common, and
when one that died is started again, is in children.py.
"""
