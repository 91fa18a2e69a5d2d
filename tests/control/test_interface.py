"""The interface of a node's Ray address, which is that of no other machine."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pytest

from cluster.allocation import Node, RayOnNodes
from cluster.doctor.judgement import selects
from orchestrator.control import interface
from orchestrator.control.interface import interface_of


def test_the_interface_that_carries_an_address() -> None:
    own = {
        a.address: name for name, found in psutil.net_if_addrs().items() for a in found if a.family == socket.AF_INET
    }
    for address, name in own.items():
        assert interface_of(address) == ("" if address.startswith("127.") else name)
    assert interface_of("127.0.0.1") == ""
    assert interface_of("203.0.113.7") == ""  # of nobody


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.1")
    monkeypatch.setattr(interface, "interface_of", lambda address: "eth1")
    return monkeypatch


def test_one_interface_is_chosen_and_no_other_that_begins_as_it(unset: pytest.MonkeyPatch) -> None:
    interface.choose_interface()
    gloo, nccl = os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]
    names = "eth1", "eth10"
    assert [name for name in names if selects(gloo, name, is_prefix=False)] == ["eth1"]
    assert [name for name in names if selects(nccl, name, is_prefix=True)] == ["eth1"]


def test_what_somebody_has_set_stays(unset: pytest.MonkeyPatch) -> None:
    unset.setenv("NCCL_SOCKET_IFNAME", "ib")
    interface.choose_interface()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth1", "ib")


def test_an_allocation_names_it_in_the_same_way(tmp_path: Path) -> None:
    ray_on_nodes = RayOnNodes(tmp_path, Node(0, 1, 1, 0), join_timeout_s=1, interface="lo")
    variables = ray_on_nodes.environment
    assert (variables["GLOO_SOCKET_IFNAME"], variables["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
