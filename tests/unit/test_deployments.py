"""The guides' manifests and units: what they start exists, and what stops it waits for longer than it takes."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgpubsub_celery.settings import Settings
from tests.fixtures.command_lines import PROGRAMS, parse
from tests.fixtures.pages import DOCS
from tests.fixtures.processes import BIN

MANIFESTS = sorted((DOCS / "guides" / "kubernetes").glob("*.yaml"))
UNITS = sorted((DOCS / "guides" / "systemd").glob("*.service"))


def documents() -> Iterator[dict[str, Any]]:
    """Yield all that the manifests describe."""
    for manifest in MANIFESTS:
        yield from yaml.safe_load_all(manifest.read_text(encoding="utf-8"))


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the pod of everything that runs something."""
    for document in documents():
        if "template" in document["spec"]:
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def container(pod: dict[str, Any]) -> dict[str, Any]:
    """Return a pod's only container."""
    (only,) = pod["containers"]
    assert isinstance(only, dict)
    return only


def drain_timeout(words: list[str]) -> float:
    """Return how long a bridge that is started like this may take to stop."""
    found = re.search(r"--drain-timeout[= ](\S+)", " ".join(words))
    return float(found[1]) if found else Settings().drain_timeout


PODS = dict(pods())
SERVICES: dict[str, configparser.SectionProxy] = {}
for _unit in UNITS:
    _parser = configparser.ConfigParser(interpolation=None)
    _parser.optionxform = str  # type: ignore[assignment,method-assign]  # systemd tells capitals apart
    _parser.read(_unit)
    SERVICES[_unit.name] = _parser["Service"]


def test_there_are_a_bridge_and_a_worker_of_each_kind() -> None:
    """And the step that comes before them."""
    assert set(PODS) == {"blog-install-1", "blog-bridge", "blog-worker"}
    assert set(SERVICES) == {"blog-bridge.service", "blog-worker.service"}


@pytest.mark.parametrize("name", PODS)
def test_a_pod_starts_a_command_that_there_is(name: str) -> None:
    """With the options that there are."""
    words = container(PODS[name])["command"]
    assert len(parse(PROGRAMS[words[0]], words)) > 1


@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_starts_a_command_that_there_is(name: str) -> None:
    """With the options that there are."""
    program, *words = shlex.split(SERVICES[name]["ExecStart"])
    assert Path(program).is_absolute()  # systemd looks for no other
    assert len(parse(PROGRAMS[Path(program).name], [Path(program).name, *words])) > 1


def test_kubernetes_waits_for_longer_than_a_bridge_takes_to_stop() -> None:
    """Or a batch would be cut off."""
    pod = PODS["blog-bridge"]
    assert pod["terminationGracePeriodSeconds"] > drain_timeout(container(pod)["command"])


def test_systemd_waits_for_longer_than_a_bridge_takes_to_stop() -> None:
    """And tells the main process alone, which tells its own: a worker's children would not finish their tasks."""
    service = SERVICES["blog-bridge.service"]
    assert float(service["TimeoutStopSec"]) > drain_timeout([service["ExecStart"]])
    assert {one["KillMode"] for one in SERVICES.values()} == {"mixed"}


def test_probes_ask_the_port_that_the_bridge_serves() -> None:
    """Alive by one page, ready by the other."""
    bridge = container(PODS["blog-bridge"])
    (port,) = bridge["ports"]
    assert f"--health-port={port['containerPort']}" in bridge["command"]
    asked = {kind: bridge[kind]["httpGet"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {get["port"] for get in asked.values()} == {port["name"]}
    assert [get["path"] for get in asked.values()] == ["/livez", "/livez", "/readyz"]


def test_deployments_select_their_own_pods() -> None:
    """As does the budget that keeps one bridge alive."""
    for document in documents():
        if document["kind"] == "Deployment":
            selected = document["spec"]["selector"]["matchLabels"]
            assert selected == document["spec"]["template"]["metadata"]["labels"]
        if document["kind"] == "PodDisruptionBudget":
            assert document["spec"]["selector"]["matchLabels"] == {"app": "blog", "part": "bridge"}


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_are_what_systemd_reads(unit: Path, tmp_path: Path) -> None:
    """By systemd itself where it is installed; every line is a section, an assignment, a comment, or nothing."""
    text = unit.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"\[(Unit|Service|Install)\]|[A-Z]\w+=\S.*", line)] == []
    analyze = shutil.which("systemd-analyze")
    if analyze is not None:
        copy = tmp_path / unit.name
        copy.write_text(text.replace("/srv/blog/.venv/bin", str(BIN)))
        verified = subprocess.run(
            [analyze, "verify", "--man=no", copy], capture_output=True, text=True, timeout=60, check=False
        )
        complaints = [line for line in verified.stderr.splitlines() if unit.name in line]
        assert complaints == []
