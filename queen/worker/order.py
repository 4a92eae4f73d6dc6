"""The order in which tasks run that became ready in the same turn of the loop.

Trio reverses it at random, so that nobody relies on it. Clients do: one that sends two pushes over two connections, the
second right after the first, wants them stored in that order, and a busy worker finds both in one turn. The kernel
reports them as they came, and with the coin of Trio's scheduler always falling on the same side they are served so.
"""

from __future__ import annotations

import random

import trio._core._run as scheduler


def serve_in_order_of_arrival() -> None:
    """From now on, for the life of this process. A Trio without that coin goes on in an order of its own."""
    coin = random.Random()
    coin.random = lambda: 0.0  # type: ignore[method-assign]  # a turn is taken from its end, so turned round first
    scheduler._r = coin
