"""What the audits found, shown at the end of the test run."""

from collections.abc import Callable

import pytest

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


def pytest_terminal_summary(terminalreporter, config):
    lines = config.stash.get(FOUND, [])
    if lines:
        terminalreporter.section("what the audits found")
        for line in lines:
            terminalreporter.line(line)
