"""`python -m bench`: measure, report, compare.

python -m bench                                       # all scenarios, all peers: results, report, plots
python -m bench --scenario drain --scenario latency   # these; merged into the stored results
python -m bench --peer pgqueuer                       # beside this peer only
python -m bench --quick --baseline                    # store the ratios that --check compares with
python -m bench --check                               # a quick run: what got worse? Exit code 1 if anything
python -m bench --report                              # the report and the plots again, from the stored results
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from bench import comparison, machine, results, scenarios
from bench.ground import Ground
from bench.ratios import RATIOS
from bench.results import Outcome
from bench.scale import FULL, QUICK, SCALES, Scale
from bench.systems import NAMES as PEERS

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"
BASELINE = FOLDER / "baseline.json"

EXIT_WORSE = 1
GUARD_PEERS: Mapping[str, Collection[str]] = {
    "publish": ["plain_celery"],
    "drain": ["plain_celery", "pgqueuer"],
    "latency": ["plain_celery"],
}
"""For each scenario those that a ratio is against: the guard needs no others."""
CHECK_SECONDS = 170.0
"""A check's time; what got worse is measured once more if that is likely to fit."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    options = _parser().parse_args(arguments)
    peers = dict.fromkeys(scenarios.NAMES, options.peer or PEERS[1:])
    if (options.quick or options.check) and not options.peer:
        peers = {name: GUARD_PEERS.get(name, ()) for name in scenarios.NAMES}
    if options.report:
        return _report(results.read(options.output))
    if options.check:
        return _check(peers, options.scenario or scenarios.NAMES)
    scale = QUICK if options.quick else SCALES[options.scale]
    outcome = measure(scale, options.scenario or scenarios.NAMES, peers)
    if options.baseline:
        comparison.store(BASELINE, outcome)
        print(f"stored the ratios in {BASELINE}")
    elif scale is FULL or options.output != RESULTS:
        merged = results.read(options.output).merge(outcome)
        results.write(options.output, merged)
        if options.output == RESULTS:
            return _report(merged)
    _print(outcome)
    return 0


def measure(scale: Scale, names: Collection[str], peers: Mapping[str, Collection[str]]) -> Outcome:
    """Run scenarios on one pair of servers."""
    outcome = Outcome()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        ground = stack.enter_context(Ground(folder))
        outcome.machine = machine.describe(ground)
        for name in scenarios.NAMES:
            if name in names:
                begin = time.monotonic()
                outcome = outcome.merge(scenarios.scenario(name)(ground, scale, peers[name]))
                outcome.scales[name] = scale.name
                outcome.seconds[name] = round(time.monotonic() - begin, 1)
                scenarios.say(f"{name} took {outcome.seconds[name]:.0f} s")
    return outcome


def _check(peers: Mapping[str, Collection[str]], names: Collection[str]) -> int:
    begin = time.monotonic()
    baseline = comparison.load(BASELINE)
    # Only what a stored ratio needs.
    needed = [name for name in names if any(ratio.scenario == name and ratio.name in baseline for ratio in RATIOS)]
    outcome = measure(QUICK, needed, peers)
    verdicts = comparison.compare(baseline, outcome, needed)
    again = {one.ratio.scenario for one in verdicts if one.worse}
    expected = sum(outcome.seconds.get(name, 0) for name in again)
    if again and time.monotonic() - begin + expected < CHECK_SECONDS:
        scenarios.say(f"measured once more, before anything is said: {', '.join(sorted(again))}")
        second = comparison.compare(baseline, outcome.merge(measure(QUICK, again, peers)), needed)
        verdicts = [max(pair, key=lambda one: not one.worse) for pair in zip(verdicts, second, strict=True)]
    print(comparison.told(verdicts))
    return EXIT_WORSE if any(one.worse for one in verdicts) else 0


def _report(outcome: Outcome) -> int:
    from bench import plots, report

    drawn = plots.draw(outcome)
    report.write(outcome, drawn)
    print(f"wrote {report.PAGE} and {len(drawn)} plots")
    _print(outcome)
    return 0


def _print(outcome: Outcome) -> None:
    for ratio in RATIOS:
        print(ratio.line(outcome))
    for failure in outcome.failures:
        print(f"NOT MEASURED: {failure.scenario}: {failure.what}: {failure.why.splitlines()[0]}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="What it costs, beside what others cost.")
    parser.add_argument("--scenario", action="append", choices=scenarios.NAMES, help="only this; may be repeated")
    parser.add_argument("--peer", action="append", choices=PEERS[1:], help="beside this; may be repeated")
    parser.add_argument("--scale", choices=sorted(SCALES), default=FULL.name, help="how much of everything")
    parser.add_argument("--quick", action="store_true", help="the scale of --check")
    parser.add_argument("--output", type=Path, default=RESULTS, help="merge the results into this file")
    parser.add_argument("--baseline", action="store_true", help="store the ratios that --check compares with")
    parser.add_argument("--check", action="store_true", help="a quick run, compared with the stored ratios")
    parser.add_argument("--report", action="store_true", help="write the report again from the stored results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
