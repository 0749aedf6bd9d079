"""`python -m pgpubsub_celery.cli` is `pgpubsub-bridge`."""

from pgpubsub_celery.cli import main

main(prog_name="pgpubsub-bridge")
