"""The network over which workers add up their gradients: that on which their nodes reach each other in Ray.

Left alone, gloo takes the interface that the host's name leads to, which is loopback on many machines: workers of two
hosts then wait for each other in vain.
"""

from __future__ import annotations

import os
import socket

import psutil


def variables_of(name: str) -> dict[str, str]:
    """What makes gloo and NCCL take the interface ``name`` and no other; without "=" NCCL takes eth10 for eth1."""
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


def interface_of(address: str) -> str:
    """The interface of this machine that has this IP address; "" for loopback and for another machine's."""
    for name, addresses in psutil.net_if_addrs().items():
        kinds = (socket.AF_INET, socket.AF_INET6)
        if any(each.address.partition("%")[0] == address and each.family in kinds for each in addresses):
            return "" if address.startswith("127.") or address == "::1" else name
    return ""


def choose_interface() -> None:
    """In a worker, before its process group is made. What somebody has set (at ``ray start``) stays."""
    import ray

    name = interface_of(ray.util.get_node_ip_address())
    for variable, value in variables_of(name).items() if name else ():
        os.environ.setdefault(variable, value)
