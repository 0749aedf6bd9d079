"""Probes' pages over real sockets: whoever is slow, silent, rude or many keeps nobody else from being answered."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from pgpubsub_celery.errors import SettingsError
from pgpubsub_celery.supervisor import Page, Server, serving, wait

BIG = "x" * 5_000_000
"""More than the kernel takes at once."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with some pages, served by a loop like those that serve it for good."""
    monkeypatch.setattr(serving, "SECONDS", 1.0)

    def broken() -> Page:
        raise RuntimeError("a bug")

    server = Server("127.0.0.1", 0, {"/well": lambda: Page("well\n"), "/big": lambda: Page(BIG), "/broken": broken})
    stop = threading.Event()
    wake, waker = socket.socketpair()

    def loop() -> None:
        while not stop.is_set():
            due = server.due()
            ready = wait([wake, *server.readers()], server.writers(), None if due is None else due - time.monotonic())
            server.serve(ready)

    thread = threading.Thread(target=loop)
    thread.start()
    yield server
    stop.set()
    waker.send(b".")
    thread.join()
    server.close()
    wake.close()
    waker.close()


def ask(server: Server, path: str, method: str = "GET") -> tuple[int, str]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as client:
        client.request(method, path)
        response = client.getresponse()
        return response.status, response.read().decode()


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


@pytest.mark.parametrize(
    ("method", "path", "answer"),
    [
        ("GET", "/well", (200, "well\n")),
        ("GET", "/well?since=1", (200, "well\n")),
        ("HEAD", "/well", (200, "")),
        ("GET", "/nothing", (404, "there is /big, /broken, /well\n")),
        ("POST", "/well", (405, "GET, or HEAD\n")),
        ("GET", "/broken", (500, "failed; the log says why\n")),
        ("GET", "/big", (200, BIG)),
    ],
)
def test_what_is_asked_for_is_answered(server: Server, method: str, path: str, answer: tuple[int, str]) -> None:
    """As much of HTTP as probes and scrapes need; a page that fails is no reason to end."""
    assert ask(server, path, method) == answer
    assert ask(server, "/well") == (200, "well\n")


def test_who_says_nothing_or_does_not_read_is_let_go(server: Server) -> None:
    """And holds up nobody meanwhile."""
    silent, slow, gone = connect(server), connect(server), connect(server)
    slow.sendall(b"GET /big HTTP/1.1\r\n\r\n")
    gone.close()
    assert ask(server, "/well") == (200, "well\n")
    with silent, slow:
        assert silent.recv(1) == b"", "it was hung up on"
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while chunk := slow.recv(1 << 16):
                received += len(chunk)
        assert received < len(BIG)


def test_a_request_that_does_not_end_is_refused(server: Server) -> None:
    """Nobody's memory is filled."""
    with connect(server) as endless:
        endless.sendall(b"GET /well HTTP/1.1\r\n" + b"X: y\r\n" * 5_000)
        assert endless.recv(100).startswith(b"HTTP/1.1 431 ")


def test_more_visitors_than_there_is_room_for_wait(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until one of those before them has gone."""
    monkeypatch.setattr(serving, "VISITORS", 2)
    with connect(server), connect(server), connect(server):
        assert ask(server, "/well") == (200, "well\n")


def test_all_addresses_are_those_of_both_kinds() -> None:
    """What an empty host means; Kubernetes probes a pod by the one that it has."""
    server = Server("", 0, {})
    try:
        families = {socket.AF_INET6, socket.AF_INET}
        assert server.sockets[0].family in families
        with connect(server):
            pass
    finally:
        server.close()


def test_an_address_that_is_not_ours_is_refused() -> None:
    """With what was asked for, and why not."""
    for host, port in (("192.0.2.1", 0), ("no.such.host.invalid", 80), ("127.0.0.1", 70_000)):
        with pytest.raises(SettingsError, match=f"port {port} of {host}"):
            Server(host, port, {})
