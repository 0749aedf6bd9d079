"""What this package costs, beside what its peers cost: the same work, in one run, on one machine.

Reading order: `scale` (how much), `ground` (servers, databases, processes), `applications` (what each system's users
would write), `systems` (how each is run), `scenarios` (what is measured), `results`, `ratios`, `comparison` and
`report` (what becomes of it). `make bench` measures all, `make bench-check` whether it got worse.
"""
