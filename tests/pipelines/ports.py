"""Ports for servers that tests start."""

import random
import socket
from contextlib import suppress


def free_ports(count: int) -> list[int]:
    """Ports that nobody holds now, between those of Ray's workers (to 19999) and those that systems give out (from
    32768): one of the latter may be somebody else's before a server that starts slowly takes it."""
    found: list[int] = []
    for port in random.sample(range(20000, 32768), 1000):
        with suppress(OSError), socket.socket() as any_port:
            any_port.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no ports are free")
