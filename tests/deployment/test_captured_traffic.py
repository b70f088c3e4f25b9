"""Every byte between a hospital and the server, caught on the way; decrypted, it is the white list."""

from collections import Counter

import numpy as np
import pytest
from flwr.app import Message
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from common import messages
from common.exit_codes import ExitCode
from common.parameters import read_safetensors
from tests.deployment.federation import go_through, prepared, result
from tests.deployment.relay import Cable, LyingProxy
from tests.test_wire_capture import ENVELOPE, MAY_LEAVE

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


def test_captured_traffic_holds_no_plaintext(tmp_path):
    folder = tmp_path / "run"
    with prepared(folder, hospitals=2, rounds=2) as rehearsal:
        rehearsal.provision()
        with Cable(("127.0.0.1", rehearsal.ports["server"]["fleet"])) as cable:
            for name in ("phantom-hospital-1", "phantom-hospital-2"):
                go_through(rehearsal, name, cable.port)
            rehearsal.launch()
            assert rehearsal.wait() is ExitCode.COMPLETED
            rehearsal.stop()
            caught = bytes(cable.passed)
    assert len(caught) > 4 * result(folder)["wire"]["bytes_up"] / 2
    words = ["phantom-hospital", "enrolled-patients", "opacity", "normal", "safetensors", "envelope"]
    words += ["output.bias", "parameters", "epsilon", "/v1/fleet", "hospital-federation"]
    assert [word for word in words if word.encode() in caught] == []
    model = read_safetensors(folder / "model.safetensors")
    initial = read_safetensors(folder / "checkpoints" / "1" / "model.safetensors")
    for weights in (model, initial):
        for array in weights.values():
            row = np.ascontiguousarray(array, dtype="<f4").tobytes()[:32]
            assert len(row) < 16 or row not in caught


def sent_by_the_hospital(asked: list[tuple[str, bytes]]) -> list[tuple[str, Message]]:
    """Type and content of every message that the hospital pushed, put together from its requests."""
    parts, replies = {}, []
    for name, body in asked:
        if name == "push-object":
            request = PushObjectRequest.FromString(body)
            parts[request.object_id] = request.object_content
        elif name == "push-messages":
            request = PushMessagesRequest.FromString(body)
            for proto, tree in zip(request.messages_list, request.message_object_trees, strict=True):
                replies.append((proto.metadata, [node.object_id for node in iterate_object_tree(tree)]))
    found = []
    for metadata, object_ids in replies:
        contents = {object_id: parts[object_id] for object_id in object_ids}
        found.append((metadata.message_type, inflate_object_from_contents(metadata.message_id, contents)))
    return found


def test_decrypted_a_hospital_sends_the_white_list_and_nothing_else(tmp_path):
    folder = tmp_path / "run"
    with prepared(folder, hospitals=1, rounds=2) as rehearsal:
        rehearsal.provision()
        operator = rehearsal.operator
        with LyingProxy(
            f"127.0.0.1:{rehearsal.ports['server']['fleet']}",
            certificate=operator.server_certificate,
            key=operator.server_key,
            authority=operator.ca_certificate,
        ) as between:
            go_through(rehearsal, "phantom-hospital-1", between.port)
            rehearsal.launch()
            assert rehearsal.wait() is ExitCode.COMPLETED
            rehearsal.stop()
    calls = {"activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "get-run", "get-fab"}
    calls |= {"pull-object", "confirm-message-received", "push-messages", "push-object"}
    assert {name for name, _ in between.asked} <= calls
    sent = sent_by_the_hospital(between.asked)
    kinds = Counter(kind for kind, _ in sent)
    assert kinds == {messages.HELLO: 1, messages.TRAIN: 2, messages.EVALUATE: 1, messages.CLOSING: 1}
    for kind, message in sent:
        # Phantoms have no validation split, and their hospital releases no metrics.
        may_leave = {messages.REFUSAL: {"code"}} if kind == messages.EVALUATE else MAY_LEAVE[kind]
        expected = {messages.ENVELOPE: ENVELOPE, **may_leave}
        assert set(message.content) == set(expected)
        for name, keys in expected.items():
            assert keys is None or set(message.content[name]) == keys
    everything = b"".join(body for _, body in between.asked)
    for private in (b"/hospitals/", b"images.npz", b".toml", str(tmp_path).encode()):
        assert private not in everything
