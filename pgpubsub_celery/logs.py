"""What a listening process prints: one line for each record, in a `%` format or as JSON.

Owns the configuration of logging for processes of ours (bridges, supervisors), never for a user's: a worker's logging
is Celery's, which takes our formats where it is asked to (`worker_logformat`). No payload, password or whole URL ever
gets into a record of ours; see who logs.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from pgpubsub_celery.errors import SettingsError, did_you_mean

DEFAULT_FORMAT = "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"
JSON = "json"
LEVELS = ("debug", "info", "warning", "error", "critical")

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Celery's: a task's arguments and what it has returned, which are nobody's to print.
_LEFT_OUT = _STANDARD | {"data"}


def level_number(name: str) -> int:
    """Return the number of a log level, in any case; SettingsError names the known ones."""
    if name.lower() not in LEVELS:
        raise SettingsError(
            f"loglevel is {name!r}: expected one of {', '.join(LEVELS)}.{did_you_mean(name.lower(), LEVELS)}"
        )
    return int(getattr(logging, name.upper()))


def make_formatter(logformat: str | None) -> logging.Formatter:
    """Return the formatter for a `%` format, `json`, or None for ours; SettingsError when it cannot format a record."""
    if logformat is None:
        return logging.Formatter(DEFAULT_FORMAT)
    if logformat.strip().lower() == JSON:
        return JsonFormatter()
    try:
        formatter = logging.Formatter(logformat)
        formatter.format(logging.makeLogRecord({"msg": "a record"}))
    except (ValueError, KeyError, TypeError) as exc:
        raise SettingsError(
            f"logformat is {logformat!r}, which cannot format a record ({exc}): expected a format such as "
            "'%(asctime)s %(message)s', or json."
        ) from None
    return formatter


def configure_logging(loglevel: str, logformat: str | None) -> None:
    """Send this process's records to standard error; replaces what was configured before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(make_formatter(logformat))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level_number(loglevel))
    # Their debug records hold statements, parameters and messages.
    for name in ("sqlalchemy.engine", "kombu", "amqp"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def set_format(logger: logging.Logger, logformat: str) -> None:
    """Have a logger's handlers write in a `%` format or as JSON; for those whose logging others have configured."""
    formatter = make_formatter(logformat)
    for handler in logger.handlers:
        handler.setFormatter(formatter)


_ids: list[Callable[[], Mapping[str, Any]]] = []


def add_ids(read: Callable[[], Mapping[str, Any]]) -> None:
    """Have `read()` say what every JSON line is about; what a record brings itself goes before."""
    _ids.append(read)


class JsonFormatter(logging.Formatter):
    """One JSON object for each record: time, level, logger, process, message, and whatever `extra=` gave.

    Lines about notifications have `notification_id` (or `notification_ids`) and `channel`, and in workers `task_id` and
    `listener`: also those that a listener logs itself, and those that Celery logs of its run.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc).isoformat(
                timespec="milliseconds"
            ),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        for read in _ids:
            line |= read()
        line |= _of_celery(record)
        line |= {key: value for key, value in vars(record).items() if key not in _LEFT_OUT and not key.startswith("_")}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def _of_celery(record: logging.LogRecord) -> dict[str, Any]:
    """Return the ids in what Celery logs of tasks: arguments of its messages, which are not to be lost in a text."""
    data = getattr(record, "data", None)
    told = record.args if isinstance(record.args, Mapping) else data if isinstance(data, Mapping) else {}
    names = {"id": "task_id", "name": "task"}
    return {name: told[key] for key, name in names.items() if isinstance(told.get(key), str)}
