"""A RabbitMQ node of ours: the system's own package, in a folder, at ports and under a name of the test's own.

Owns the node and the port mapper that Erlang needs, both stopped by their process ids. A server that is not installed
is an error with the command that installs it.
"""

from __future__ import annotations

import signal
import subprocess
import uuid
from pathlib import Path

import amqp
from amqp.exceptions import AMQPError

from pgpubsub_celery.embedded import start_process
from pgpubsub_celery.embedded.server import HOST, EmbeddedServer, NotReady, free_port
from pgpubsub_celery.errors import EmbeddedServerError

BINARIES = (Path("/usr/lib/rabbitmq/bin"), Path("/usr/local/sbin"), Path("/opt/rabbitmq/sbin"))
INSTALL = "apt-get update && apt-get install -y rabbitmq-server"
CONTROL_SECONDS = 60.0


class RabbitMQ(EmbeddedServer):
    """A node of one: a context manager, as the embedded servers are."""

    name = "RabbitMQ"
    _stop_signal = signal.SIGTERM
    _immediate_signal = signal.SIGKILL

    def __init__(self) -> None:
        """Describe a node; nothing happens before `start`."""
        super().__init__(None)
        self._node = f"pgpubsub-{uuid.uuid4().hex[:8]}@localhost"
        self._mapper: subprocess.Popen[bytes] | None = None
        self._mapper_port = free_port()
        self._distribution_port = free_port()
        self._binaries = _binaries()

    @property
    def url(self) -> str:
        """The URL of the default virtual host."""
        return f"amqp://guest:guest@{HOST}:{self.port}//"

    def control(self, *words: str) -> str:
        """Run `rabbitmqctl`, and return what it prints."""
        done = subprocess.run(
            [self._binaries / "rabbitmqctl", "--quiet", "-n", self._node, *words],
            env=self._environment(self.port),
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=CONTROL_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"rabbitmqctl {' '.join(words)}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def evaluate(self, expression: str) -> str:
        """Have the node evaluate an Erlang expression."""
        return self.control("eval", expression).strip()

    def version(self) -> str:
        """The server's version."""
        return self.evaluate("rabbit_misc:version().").strip('"')

    def close(self) -> None:
        """Stop the node and the port mapper, and remove their files."""
        super().close()
        if self._mapper is not None:
            self._mapper.kill()
            self._mapper.wait()
            self._mapper = None

    def _prepare(self) -> None:
        for name in ("data", "logs", "home"):
            (self.directory / name).mkdir(exist_ok=True)
        cookie = self.directory / "home" / ".erlang.cookie"
        if not cookie.exists():
            cookie.touch(mode=0o600)
            cookie.write_text(uuid.uuid4().hex)
            cookie.chmod(0o400)
        (self.directory / "plugins").write_text("[].\n")
        (self.directory / "rabbitmq.conf").write_text(
            # An alarm is a test's doing, never the machine's.
            "disk_free_limit.absolute = 1MB\nvm_memory_high_watermark.absolute = 4GB\nlog.console.level = warning\n"
        )
        if self._mapper is None:
            self._mapper = start_process(
                ["epmd", "-port", str(self._mapper_port), "-address", HOST],
                death_signal=signal.SIGKILL,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def _environment(self, port: int) -> dict[str, str]:
        folder = self.directory
        return {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "HOME": str(folder / "home"),
            "ERL_EPMD_PORT": str(self._mapper_port),
            "ERL_EPMD_ADDRESS": HOST,
            # Neither waits for input nor stands between us and the node: its pid is the node's.
            "RUNNING_UNDER_SYSTEMD": "1",
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_NODE_IP_ADDRESS": HOST,
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 2:2",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "logs"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(folder / "pid"),
        }

    def _command(self, port: int) -> list[str | Path]:
        environment = [f"{name}={value}" for name, value in self._environment(port).items()]
        return ["/usr/bin/env", "-i", *environment, self._binaries / "rabbitmq-server"]

    def _check(self, port: int) -> None:
        try:
            with amqp.Connection(f"{HOST}:{port}", "guest", "guest", connect_timeout=2) as connection:
                channel = connection.channel()
                channel.queue_declare(exclusive=True)
        except (OSError, AMQPError) as error:
            raise NotReady(str(error)) from None


def _binaries() -> Path:
    for folder in BINARIES:
        if (folder / "rabbitmq-server").exists():
            return folder
    places = ", ".join(map(str, BINARIES))
    raise EmbeddedServerError(f"No RabbitMQ to test with (looked in {places}). Fix: {INSTALL}")
