"""The roster while the server runs: what fails for one, what is said once, and who is here."""

import httpx
import pytest
from flwr.proto.control_pb2 import ListNodesResponse
from flwr.proto.node_pb2 import NodeInfo

from common.node_keys import load_public_key, make_key
from server.deployment.attendance import ENFORCE_S, Attendance
from server.deployment.control import Control
from server.provisioning.operator_config import OperatorFolder
from server.provisioning.roster import enroll, new_roster, read_roster


class ControlApi:
    """Flower's Control API; refuses whom it is told to refuse."""

    def __init__(self):
        self.nodes, self.refused, self.is_away, self.calls = {}, set(), False, 0

    def ListNodes(self, request):
        self.calls += 1
        if self.is_away:
            raise httpx.ConnectError("away")
        return ListNodesResponse(nodes_info=self.nodes.values())

    def RegisterNode(self, request):
        self._maybe_refuse(request.name)
        self.nodes[request.name] = NodeInfo(
            node_id=len(self.nodes) + 1, public_key=request.public_key, name=request.name, status="offline"
        )

    def UnregisterNode(self, request):
        (name,) = [name for name, node in self.nodes.items() if node.node_id == request.node_id]
        self._maybe_refuse(name)
        self.nodes[name].status = "unregistered"

    def _maybe_refuse(self, name):
        if name in self.refused:
            raise httpx.HTTPStatusError("no", request=None, response=httpx.Response(500))

    def close(self):
        pass


@pytest.fixture
def at(tmp_path):
    class Scene:
        now, said, api = 1000.0, [], ControlApi()
        folder = OperatorFolder(tmp_path)

        def enroll(self, name):
            make_key(tmp_path / name, tmp_path / f"{name}.pub", comment=name)
            key = load_public_key(tmp_path / f"{name}.pub")
            enroll(self.folder.roster, name=name, key=key, enrolled_patients=10)

        def enforced(self):
            self.said.clear()
            self.attendance.enforce()
            return [line.partition(" (")[0].partition(":")[0] for line in self.said]

        def looked(self):
            self.said.clear()
            self.attendance.look()
            return list(self.said)

    scene = Scene()
    new_roster(scene.folder.roster)
    control = Control(1, authority=AUTHORITY)
    control._client = scene.api
    scene.attendance = Attendance(scene.folder, control, scene.said.append, clock=lambda: scene.now)
    for name in ("a", "b", "c"):
        scene.enroll(name)
    return scene


@pytest.fixture(autouse=True, scope="module")
def _authority(tmp_path_factory):
    from server.provisioning.certificates import make_authority

    global AUTHORITY
    folder = tmp_path_factory.mktemp("ca")
    make_authority(folder / "key", folder / "crt", federation="f")
    AUTHORITY = (folder / "crt").read_bytes()


def test_one_that_cannot_be_let_in_keeps_nobody_else_out_and_is_said_once(at):
    at.api.refused = {"a"}
    assert at.enforced() == ["b may connect", "c may connect", "a could not be let in"]
    at.now += ENFORCE_S
    assert at.enforced() == []
    assert len(read_roster(at.folder.roster)) == 3
    at.api.refused = set()
    at.now += ENFORCE_S
    assert at.enforced() == ["a may connect"]


def test_one_that_cannot_be_taken_out_is_tried_again(at):
    at.enforced()
    new_roster(at.folder.roster)
    at.enroll("d")
    at.api.refused = {"b"}
    assert sorted(at.enforced()) == [
        "a may no longer connect",
        "b could not be taken out",
        "c may no longer connect",
        "d may connect",
    ]
    at.api.refused = set()
    at.now += ENFORCE_S
    assert at.enforced() == ["b may no longer connect"]


def test_the_roster_is_enforced_now_and_then_also_when_it_has_not_changed(at):
    at.enforced()
    del at.api.nodes["b"]
    calls = at.api.calls
    at.now += ENFORCE_S - 1
    assert at.enforced() == []
    assert at.api.calls == calls
    at.now += 1
    assert at.enforced() == ["b may connect"]


def test_nobody_is_another_thing_than_nobody_could_be_asked(at):
    at.enforced()
    at.api.nodes["a"].status = at.api.nodes["b"].status = "online"
    assert at.looked() == ["a is connected", "b is connected"]
    at.api.is_away = True
    assert at.attendance.look() is False
    assert len(at.attendance.online) == 2
    at.api.is_away = False
    at.api.nodes["a"].status, at.api.nodes["b"].status = "offline", "unregistered"
    assert at.looked() == ["a is not connected", "b is not connected"]
    assert at.attendance.online == []
    assert at.looked() == []
