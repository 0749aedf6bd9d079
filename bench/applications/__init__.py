"""What users of each system would write: tables, tasks, and the transactions that cause them.

One module for each system, with the same functions: `prepare`, `write`, `write_plain`, `bulk`, `backlog`. Run as a
process (`python -m bench.applications NAME`) that does what it is told on standard input. The same modules are what
the systems' own workers load.
"""
