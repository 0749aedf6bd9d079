"""Small pages over HTTP, from a loop that waits for other things as well: probes and metrics.

Owns the listening socket, its visitors, and as much of HTTP as a probe or a scrape needs: GET and HEAD, one answer,
goodbye. Never waits and never starts a thread: its owner's loop waits for its sockets with `wait`, and hands what is
ready to `serve`. It exists because the process above all others must not fork beside a thread, and because a page that
this very loop answers says that the loop turns.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pgpubsub_celery.errors import SettingsError

logger = logging.getLogger("pgpubsub_celery.supervisor")

VISITORS = 64
"""At once, at most; others wait in the kernel's queue."""
REQUEST_BYTES = 8192
SECONDS = 10.0
"""How long a visitor may take for request and answer together."""
PAUSE_SECONDS = 1.0
"""How long nobody is let in when there was no descriptor to be had for the last one."""

_REASONS = {
    200: "OK",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}


@dataclass(frozen=True)
class Page:
    """An answer."""

    body: str
    status: int = 200
    content_type: str = "text/plain; charset=utf-8"


Pages = Mapping[str, Callable[[], Page]]
"""By path."""


def wait(readers: Iterable[Any], writers: Iterable[Any], timeout: float | None) -> set[Any]:
    """Return what can be read or written, of descriptors and objects with one; nothing after `timeout` seconds."""
    with selectors.DefaultSelector() as selector:
        for one in readers:
            selector.register(one, selectors.EVENT_READ)
        for one in writers:
            selector.register(one, selectors.EVENT_WRITE)
        return {key.fileobj for key, _ in selector.select(timeout)}


class _Visitor:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.received = b""
        self.to_send = b""
        self.leaves_at = time.monotonic() + SECONDS


class Server:
    """Answers on one port, for as long as its owner calls `serve`."""

    def __init__(self, host: str, port: int, pages: Pages) -> None:
        """Listen. An empty `host` is all addresses, of IPv4 and IPv6; port 0 is any that is free.

        Raises:
            SettingsError: the address cannot be had; names it, the reason, the fix.
        """
        self._pages = pages
        self._visitors: dict[socket.socket, _Visitor] = {}
        self._closed_until = 0.0
        try:
            self._socket = _listen(host, port)
        except OSError as exc:
            raise SettingsError(
                f"Nothing can be served on port {port} of {host or 'all addresses'} ({exc}): choose another port, or "
                "end what uses it."
            ) from exc
        self._socket.setblocking(False)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._socket.getsockname()[1])

    @property
    def sockets(self) -> list[socket.socket]:
        """All that is open; a forked child closes its copies."""
        return [self._socket, *self._visitors]

    def readers(self) -> list[socket.socket]:
        """Return what to wait for, to be read."""
        waiting = [one.connection for one in self._visitors.values() if not one.to_send]
        full = len(self._visitors) >= VISITORS or time.monotonic() < self._closed_until
        return waiting if full else [self._socket, *waiting]

    def writers(self) -> list[socket.socket]:
        """Return what to wait for, to be written."""
        return [one.connection for one in self._visitors.values() if one.to_send]

    def due(self) -> float | None:
        """Return when `serve` is to be called though nothing is ready, in monotonic time."""
        dues = [one.leaves_at for one in self._visitors.values()]
        if time.monotonic() < self._closed_until:
            dues.append(self._closed_until)
        return min(dues, default=None)

    def serve(self, ready: Collection[Any]) -> None:
        """Deal with those that are ready, and with those that have taken too long."""
        now = time.monotonic()
        for visitor in list(self._visitors.values()):
            if visitor.connection in ready:
                self._attend(visitor)
            elif now >= visitor.leaves_at:
                self._dismiss(visitor)
        if self._socket in ready:
            self._welcome()

    def close(self) -> None:
        """Stop listening, and let everybody go."""
        for visitor in list(self._visitors.values()):
            self._dismiss(visitor)
        self._socket.close()

    def _welcome(self) -> None:
        while len(self._visitors) < VISITORS:
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, ConnectionError):  # nobody is left, or has gone again
                return
            except OSError as exc:
                # Whoever waits stays in the queue, and would be ready again at once.
                logger.warning("nobody can be let in for now: %s", exc)
                self._closed_until = time.monotonic() + PAUSE_SECONDS
                return
            connection.setblocking(False)
            self._visitors[connection] = _Visitor(connection)

    def _attend(self, visitor: _Visitor) -> None:
        try:
            if not visitor.to_send and not self._read(visitor):
                return
            sent = visitor.connection.send(visitor.to_send)
            visitor.to_send = visitor.to_send[sent:]
        except BlockingIOError:
            return
        except OSError:
            self._dismiss(visitor)
            return
        if not visitor.to_send:
            self._dismiss(visitor)

    def _read(self, visitor: _Visitor) -> bool:
        """Read on; whether there is something to answer."""
        received = visitor.connection.recv(REQUEST_BYTES)
        if not received:
            raise ConnectionResetError("gone before it has asked")
        visitor.received += received
        if b"\r\n\r\n" in visitor.received or b"\n\n" in visitor.received:
            visitor.to_send = self._answer(visitor.received)
        elif len(visitor.received) > REQUEST_BYTES:
            visitor.to_send = _encode(Page("too long\n", 431), with_body=True)
        return bool(visitor.to_send)

    def _answer(self, request: bytes) -> bytes:
        words = request.split(b"\n", 1)[0].decode("latin-1").split()
        method, path = (words[0], words[1].partition("?")[0]) if len(words) >= 2 else ("", "")
        if method not in ("GET", "HEAD"):
            return _encode(Page("GET, or HEAD\n", 405), with_body=True)
        make = self._pages.get(path)
        if make is None:
            page = Page("there is " + ", ".join(sorted(self._pages)) + "\n", 404)
        else:
            try:
                page = make()
            except Exception:
                # This loop has more to do than to answer.
                logger.exception("failed to make the page %s", path)
                page = Page("failed; the log says why\n", 500)
        return _encode(page, with_body=method == "GET")

    def _dismiss(self, visitor: _Visitor) -> None:
        del self._visitors[visitor.connection]
        with contextlib.suppress(OSError):
            visitor.connection.shutdown(socket.SHUT_WR)
        visitor.connection.close()


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65_535:
        raise OSError("there are ports up to 65535")
    if not host:
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server((str(address[0]), port), family=family)


def _encode(page: Page, *, with_body: bool) -> bytes:
    body = page.body.encode()
    head = (
        f"HTTP/1.1 {page.status} {_REASONS[page.status]}\r\nContent-Type: {page.content_type}\r\n"
        f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode("latin-1") + (body if with_body else b"")
