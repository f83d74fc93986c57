"""What every test gets: real data where a machine has them, and no way out of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
if "CUPEL_DATA" not in os.environ and _BESIDE.is_dir():
    os.environ["CUPEL_DATA"] = str(_BESIDE)

# a thread given back to a busy machine in mid-run changes the last bits, which tests compare
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

_LOCAL = {"", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::"}
_guarding = [False]


class OutsideConnection(AssertionError):
    """A test that is not marked `network` tried to leave the machine."""


def _host(event: str, arguments: tuple[Any, ...]) -> str:
    """The host that a socket event is about; empty = this machine."""
    place = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
    place = place[0] if isinstance(place, tuple) else "" if event != "socket.getaddrinfo" else place
    return place.decode() if isinstance(place, bytes) else str(place or "")


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _guarding[0] and event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        host = _host(event, arguments)
        if host not in _LOCAL:
            raise OutsideConnection(f"{event} to {host}; mark the test `network` if it must")


sys.addaudithook(_hook)


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest) -> Iterator[None]:
    """Connections to other machines fail, unless the test is marked `network`."""
    _guarding[0] = request.node.get_closest_marker("network") is None
    yield
    _guarding[0] = False


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data; skips where there is none."""
    named = os.environ.get("CUPEL_DATA", "")
    if not named or not Path(named).is_dir():
        pytest.skip("CUPEL_DATA names no folder of real data")
    return Path(named)
