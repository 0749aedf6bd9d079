"""A TCP proxy that breaks connections in the ways a network does.

Owns a process of its own, an event loop in it, and the sockets. Knows nothing of what passes through. It exists because
a server that is killed closes its connections, while a network does not: here they can also freeze, or end on one side
only. A process, because in one of the test's threads it would wait for the others, and everything else for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

from pgpubsub_celery.embedded import start_process

CHUNK = 65_536
ABORTIVE = struct.pack("ii", 1, 0)
"""SO_LINGER: close by RST."""


class FaultProxy:
    """Forwards 127.0.0.1:`port` to a server of this machine, until told otherwise. Safe to call from any thread."""

    def __init__(self, target_port: int) -> None:
        self._lock = threading.Lock()
        self._process = start_process(
            [sys.executable, "-m", "tests.chaos.proxy", str(target_port)],
            death_signal=signal.SIGKILL,
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.port = self._answer()

    def cut(self) -> None:
        """Reset all connections, on both sides."""
        self._tell("cut")

    def cut_clients(self) -> None:
        """Reset the clients' sides only: the server goes on believing in them, until `forget`."""
        self._tell("cut_clients")

    def forget(self) -> None:
        """End the server's side of what `cut_clients` has cut."""
        self._tell("forget")

    def freeze(self) -> None:
        """Let nothing pass any more; connections stay, new ones are accepted, and hang."""
        self._tell("freeze")

    def thaw(self) -> None:
        """Let pass what has been waiting, and all else."""
        self._tell("thaw")

    def close(self) -> None:
        """End it with all connections."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _tell(self, command: str) -> None:
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(f"{command}\n".encode())
            self._process.stdin.flush()
            self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


class _Proxy:
    """The process's side."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._links: set[_Link] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def run(self) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=CHUNK)
        _say(server.sockets[0].getsockname()[1])
        commands = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
        while command := (await commands.readline()).decode().strip():
            _say(self._obey(command))

    def _obey(self, command: str) -> int:
        links = list(self._links)
        if command == "freeze":
            self._flowing.clear()
        elif command == "thaw":
            self._flowing.set()
        elif command == "cut_clients":
            for link in links:
                link.reset_client()
        else:
            for link in links:
                if command == "cut" or link.half:
                    link.reset()
        return len(links)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORTIVE)
    writer.transport.abort()


def _say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_Proxy(int(sys.argv[1])).run())
