"""What the audits found, shown at the end of the test run."""

from collections.abc import Callable

import pytest

from simulations.audits.finding import Finding

FOUND = pytest.StashKey[list[str]]()


def pytest_configure(config):
    config.stash.setdefault(FOUND, [])


@pytest.fixture
def found(request, record_property) -> Callable[[str, float], None]:
    """Keep a number of this audit for the summary and for a JUnit file."""

    def keep(what: str, value: float) -> None:
        record_property(what, value)
        lines = request.config.stash.setdefault(FOUND, [])
        lines.append(f"{request.node.name:<68} {what}: {value:.5g}")

    return keep


@pytest.fixture
def passes(found) -> Callable[[Finding], None]:
    """The finding is that nothing is wrong."""

    def judge(finding: Finding) -> None:
        for what, value in finding.numbers.items():
            found(what, value)
        assert finding.passed, finding.said

    return judge


@pytest.fixture
def fails(found) -> Callable[[Finding, str], None]:
    """The finding is a defect, and its sentence names it."""

    def judge(finding: Finding, names: str = "") -> None:
        for what, value in finding.numbers.items():
            found(what, value)
        assert not finding.passed
        assert names in finding.said

    return judge


def pytest_terminal_summary(terminalreporter, config):
    lines = config.stash.get(FOUND, [])
    if lines:
        terminalreporter.section("what the audits found")
        for line in lines:
            terminalreporter.line(line)
