"""The network of a hospital goes away for 45 s and for 150 s: it comes back by itself and loses little."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from common.exit_codes import ExitCode
from tests.deployment.federation import charged_rounds, nobody_was_charged_twice, until
from tests.deployment.namespaces import wires
from tests.deployment.operated import Operated, operated
from tests.deployment.relay import Cable

pytestmark = [pytest.mark.faults, pytest.mark.timeout(420)]
SHORT_S, LONG_S = 45.0, 150.0


@dataclass(frozen=True)
class Way:
    """How a hospital reaches the server, and how to cut it off."""

    cut: Callable[[], None]
    mend: Callable[[], None]


@contextlib.contextmanager
def ways(federation: Operated, names: list[str]) -> Iterator[list[Way]]:
    """A namespace with a wire for each hospital; where that is not permitted, a relay that swallows all."""
    with contextlib.ExitStack() as stack:
        try:
            laid = stack.enter_context(wires(len(names)))
        except pytest.skip.Exception:
            laid = []
        if laid:
            federation.open_to(*(wire.here for wire in laid))
            for name, wire in zip(names, laid, strict=True):
                federation.reach_by(name, f"{wire.here}:{federation.port}")
                federation.set_up(name, prefix=wire.prefix)
            yield [Way(wire.pull, wire.plug) for wire in laid]
            return
        cables = [stack.enter_context(Cable(("127.0.0.1", federation.port))) for _ in names]
        for name, cable in zip(names, cables, strict=True):
            federation.reach_by(name, f"127.0.0.1:{cable.port}")
        yield [
            Way(lambda c=cable: setattr(c, "is_cut", True), lambda c=cable: setattr(c, "is_cut", False))
            for cable in cables
        ]


def lines_of(federation: Operated, name: str) -> int:
    """In all logs of a hospital's processes."""
    logs = (federation.rehearsal.hospital(name) / "logs").glob("*.log")
    return sum(log.read_text(errors="replace").count("\n") for log in logs)


def test_a_short_cut_loses_nothing_and_a_long_one_at_most_the_open_round(tmp_path):
    folder = tmp_path / "run"
    settings = ["privacy.local-steps=25"]
    with operated(folder, hospitals=3, rounds=500, settings=settings, starts=False) as federation:
        short, long, _ = federation.names
        with ways(federation, [short, long]) as (short_way, long_way):
            federation.start()
            federation.await_closed(1)
            until(lambda: all((2, False) in charged_rounds(folder, n) for n in (short, long)), what="round 2")
            before = {name: lines_of(federation, name) for name in (short, long)}
            cut_at = time.monotonic()
            short_way.cut()
            long_way.cut()
            time.sleep(SHORT_S)
            short_way.mend()
            time.sleep(max(0.0, cut_at + LONG_S - time.monotonic()))
            said = {name: lines_of(federation, name) - before[name] for name in (short, long)}
            long_way.mend()
            until(
                lambda: list(federation.outcomes(long).values()).count("aggregated") > 2,
                patience_s=90,
                what=f"{long} back in the rounds",
            )
            back_s = time.monotonic() - cut_at - LONG_S
            federation.stop_the_run()
            assert federation.server_ends() == ExitCode.STOPPED
    with_short, with_long = federation.outcomes(short), federation.outcomes(long)
    # 45 s: its update of the open round came when the network was back, and no later round is without it.
    assert set(with_short.values()) == {"aggregated"}, with_short
    assert sorted(with_short) == list(range(1, max(with_short) + 1))
    # 150 s: the server waited, went on without it, and had it again.
    lost = {number: outcome for number, outcome in with_long.items() if outcome != "aggregated"}
    assert len(lost) <= 1, lost
    assert set(lost) <= {2}
    assert max(with_long) > 2
    assert back_s < 90
    # No log fills up meanwhile.
    assert all(count < 100 for count in said.values()), said
    nobody_was_charged_twice(folder, federation.names)
