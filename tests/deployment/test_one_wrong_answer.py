"""One wrong answer of a proxy on the way, on every Fleet call: the hospital is back by itself in 90 s.

500 on pull-messages, send-node-heartbeat, pull-object and push-messages is in
tests/client/deployment/test_faults_of_operation.py, with the same proxy; here is the rest.
"""

import time

import pytest

from client.server_answer import ServerState
from tests.client.deployment.running_hospital import hello, kill, send, wait_for
from tests.client.deployment.test_faults_of_operation import answers, one_500, operation

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]
BACK_WITHIN_S = 90.0
LIES = [("get-run", 500), ("get-fab", 500), ("push-object", 500), ("confirm-message-received", 500)]
LIES += [("pull-messages", 404), ("pull-messages", 413), ("pull-messages", 429)]


def test_one_wrong_answer_on_any_call_is_mended_without_anybody(tmp_path):
    took = {}
    with operation(tmp_path, between=one_500) as (server, north, node, proxy):
        for number, (call, status) in enumerate(LIES, start=1):
            grid = server.start_run()  # a new run: the SuperNode asks for it and for its bundle once
            proxy.faults[call, status] = 1
            send(grid, node, hello())
            wait_for(lambda n=number: len(proxy.lies) == n, within_s=60, what=f"a {status} to {call}")
            lied = time.monotonic()
            wait_for(lambda g=grid: answers(g, node), within_s=120, what=f"a hello answered after {call}")
            took[call, status] = time.monotonic() - lied
        # Letting in is asked by the client's own question and by the SuperNode: both get a 500.
        proxy.faults["activate-node", 500] = 2
        kill(north.processes()["supernode"])
        lied = time.monotonic()
        wait_for(lambda: proxy.faults["activate-node", 500] == 0, within_s=90, what="a 500 to activate-node")
        wait_for(lambda: answers(grid, node), within_s=120, what="a hello answered after activate-node")
        took["activate-node", 500] = time.monotonic() - lied
        # At the end nobody is kept from ending.
        proxy.faults["deactivate-node", 500] = 1
        assert north.end() == 0
        assert north.ask_server().state is not ServerState.OTHER
    assert all(seconds < BACK_WITHIN_S for seconds in took.values()), took
