"""A blog whose committed changes become Celery tasks: what a user's application looks like, and a scenario for it.

Reading order: `models`, `channels`, `listeners`, `celery_app` (the application); `account` (who did what when),
`scenario` (what is committed, and what must come of it), `running` (servers, bridge and worker as real processes).
"""
