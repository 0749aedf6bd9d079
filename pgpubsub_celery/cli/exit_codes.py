"""What the exit codes of our commands mean, for whoever starts them. Those of `listen` are the supervisor's."""

EXIT_OK = 0
EXIT_DIFFERENT = 1
"""`install --check`, `triggers check`, `triggers diff`: the database differs from what this release needs."""
EXIT_FAILED = 1
"""The command could not do what it was asked for."""
EXIT_USAGE = 2
"""Wrong usage, or a configuration that cannot work: one line on standard error says what and how to mend it."""
EXIT_ATTENTION = 4
"""`status --max-age`, `--max-failed`: a limit is exceeded."""
EXIT_UNAVAILABLE = 5
"""The database could not be reached."""
EXIT_INCOMPLETE = 6
"""`demo --once`: an effect is missing, or there twice."""
