"""procrastinate: one worker with ten concurrent asynchronous jobs."""

from __future__ import annotations

from bench.ground import Stage
from bench.systems import System


def _unfinished(stage: Stage) -> bool:
    return stage.last("procrastinate_jobs", condition="status IN ('todo', 'doing')") is not None


SYSTEM = System(
    name="procrastinate",
    application="procrastinate_jobs",
    consumers=[
        [
            "procrastinate",
            "--app=bench.applications.procrastinate_jobs.app",
            "--log-level=warning",
            "worker",
            "--concurrency=10",
            "--delete-jobs=successful",
        ]
    ],
    unfinished=_unfinished,
    settings={
        "worker": "one process, `--concurrency 10`, asynchronous tasks, `--delete-jobs successful`, LISTEN on",
        "driver": "psycopg 3 with its C implementation, a pool of 12",
    },
)
