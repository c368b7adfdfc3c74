"""Ports for servers that are told theirs before they listen, or that come back on the same one."""

from __future__ import annotations

import random
import socket

FIRST, LAST = 20_000, 32_000
"""Below what systems choose from by themselves (Linux: 32768 and up)."""


def free_port() -> int:
    """Return a port of the loopback address that nothing listens on.

    One that the system chose would be in the way of its own choices from then on: as soon as it is free, any client's
    connection may get it, those of other tests that run at the same time among them.
    """
    chance = random.SystemRandom()  # other processes choose, too, and tests set seeds
    while True:
        port = chance.randrange(FIRST, LAST)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
