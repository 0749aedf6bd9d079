"""A TCP proxy that breaks connections in the ways a network does.

Owns an event loop in a thread of its own, and the sockets. Knows nothing of what passes through. It exists because a
server that is killed closes its connections, while a network does not: here they can also freeze, or end on one side
only.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

CHUNK = 65_536
ABORTIVE = struct.pack("ii", 1, 0)
"""SO_LINGER: close by RST."""

T = TypeVar("T")


class FaultProxy:
    """Forwards 127.0.0.1:`port` to a server of this machine, until told otherwise. Safe to call from any thread."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        # All below is touched by the loop's thread only.
        self._links: set[_Link] = set()
        self._flowing = asyncio.Event()
        self._refusing = False
        self._thread.start()
        self._server, self.port = self._call(self._start())

    def cut(self) -> int:
        """Reset all connections, on both sides; return how many."""
        return self._call(self._do(self._cut))

    def cut_clients(self) -> list[_Link]:
        """Reset the clients' sides only: the server goes on believing in them until they are given to `forget`."""
        return self._call(self._do(self._cut_clients))

    def forget(self, links: list[_Link]) -> None:
        """End the server's side of what `cut_clients` returned."""
        self._call(self._do(lambda: _reset_all(links)))

    def freeze(self) -> None:
        """Let nothing pass any more; connections stay, new ones are accepted, and hang."""
        self._call(self._do(self._flowing.clear))

    def thaw(self) -> None:
        """Let pass what has been waiting, and all else."""
        self._call(self._do(self._flowing.set))

    def refuse(self, refusing: bool) -> None:
        """Reset whoever connects from now on, or no more."""
        self._call(self._do(lambda: setattr(self, "_refusing", refusing)))

    def close(self) -> None:
        """End it with all connections."""
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    @staticmethod
    async def _do(function: Callable[[], T]) -> T:
        return function()

    async def _start(self) -> tuple[asyncio.AbstractServer, int]:
        self._flowing.set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=CHUNK)
        return server, int(server.sockets[0].getsockname()[1])

    async def _stop(self) -> None:
        self._server.close()
        self._cut()
        this = asyncio.current_task()
        rest = [task for task in asyncio.all_tasks() if task is not this]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def _cut(self) -> int:
        links = list(self._links)
        _reset_all(links)
        return len(links)

    def _cut_clients(self) -> list[_Link]:
        links = [link for link in self._links if not link.half]
        for link in links:
            link.reset_client()
        return links

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            _reset(writer)
            return
        try:
            there = await asyncio.open_connection("127.0.0.1", self._target_port, limit=CHUNK)
        except OSError:
            _reset(writer)
            return
        link = _Link((reader, writer), there, self._flowing)
        self._links.add(link)
        try:
            await link.run()
        finally:
            self._links.discard(link)
            link.reset()


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Link:
    """One connection, in two halves."""

    def __init__(self, client: Streams, server: Streams, flowing: asyncio.Event) -> None:
        self._client, self._server, self._flowing = client, server, flowing
        self._over = asyncio.Event()
        self.half = False
        """The client's side is gone, the server's is kept."""

    async def run(self) -> None:
        pumps = [
            asyncio.ensure_future(self._pump(self._client[0], self._server[1])),
            asyncio.ensure_future(self._pump(self._server[0], self._client[1])),
        ]
        try:
            await asyncio.wait(pumps)
            if self.half:
                await self._over.wait()
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                data = await reader.read(CHUNK)
                await self._flowing.wait()
                if self.half and writer is self._server[1]:
                    return
                if not data:
                    break
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
        except OSError:
            if not self.half:
                self.reset()

    def reset_client(self) -> None:
        self.half = True
        _reset(self._client[1])

    def reset(self) -> None:
        self.half = False
        self._over.set()
        for _, writer in (self._client, self._server):
            _reset(writer)


def _reset_all(links: list[_Link]) -> None:
    for link in links:
        link.reset()


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORTIVE)
    writer.transport.abort()
