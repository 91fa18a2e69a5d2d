"""The interface of a node's Ray address, which is that of no other machine."""

from __future__ import annotations

import socket

import psutil

from orchestrator.control.interface import interface_of


def test_the_interface_that_carries_an_address() -> None:
    own = {
        a.address: name for name, found in psutil.net_if_addrs().items() for a in found if a.family == socket.AF_INET
    }
    for address, name in own.items():
        assert interface_of(address) == ("" if address.startswith("127.") else name)
    assert interface_of("127.0.0.1") == ""
    assert interface_of("203.0.113.7") == ""  # of nobody
