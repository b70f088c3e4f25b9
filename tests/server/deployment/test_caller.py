"""Who may send what to the front, judged before a body is taken in."""

import time
from base64 import b64encode

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa, x25519

from common.errors import ConfigError
from server.deployment import front as front_module
from server.deployment.caller import Callers, Standing
from server.deployment.front import FLEET, OPEN_PATHS, PULL, STRANGERS_PATHS
from server.provisioning.roster import enroll, revoke
from tests.server.deployment import front_door
from tests.server.deployment.front_door import ONE_MB, Door, Upstream, head, message

door, people, tls = front_door.door, front_door.people, front_door.tls

OTHERS = sorted(path.removeprefix(FLEET) for path in OPEN_PATHS - STRANGERS_PATHS - {PULL})


def pem_of(key):
    public = key.public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def broken(people, what):
    signed = people["a"].headers()
    signature = signed["flwr-signature"]
    if what == "nothing":
        return {}
    if what == "signature of another":
        return signed | {"flwr-signature": people["b"].headers()["flwr-signature"]}
    if what in ("x25519", "rsa"):
        make = {
            "x25519": x25519.X25519PrivateKey.generate,
            "rsa": lambda: rsa.generate_private_key(65537, 1024),
        }
        return signed | {"flwr-public-key": b64encode(pem_of(make[what]())).decode()}
    if what == "key written differently":
        return signed | {"flwr-public-key": b64encode(people["a"].public.pem + b"\n").decode()}
    changes = {
        "no base64": {"flwr-signature": "%" + signature},
        "another time": {"flwr-timestamp": signed["flwr-timestamp"].replace("+00:00", "-00:01")},
        "time without zone": {"flwr-timestamp": "2026-01-01T00:00:00"},
        "no time": {"flwr-timestamp": "soon"},
        "long signature": {"flwr-signature": signature + "A" * 1000},
        "key of nothing": {"flwr-public-key": "AAAA"},
    }
    return signed | changes[what]


@pytest.mark.parametrize(
    "what",
    [
        *("nothing", "signature of another", "x25519", "rsa", "key written differently", "no base64"),
        *("another time", "time without zone", "no time", "long signature", "key of nothing"),
    ],
)
def test_without_a_signature_by_a_key_nothing_is_passed_on(door, what):
    for path in sorted(OPEN_PATHS):
        answer = door.client.post(path, headers=broken(door.people, what))
        assert answer.status_code == 401
        assert "date" in answer.headers
    assert door.upstream.asked == []


@pytest.mark.parametrize(("ahead_s", "status"), [(10, 401), (3, 200), (-200, 200), (-400, 401)])
def test_the_clock_may_differ_as_much_as_flower_allows(door, ahead_s, status):
    for call in ("activate-node", "get-run"):
        assert door.post(call, ahead_s=ahead_s).status_code == status
    assert door.post("activate-node", by="stranger", ahead_s=ahead_s).status_code == status


def test_a_key_that_is_not_on_the_roster_hears_flowers_own_answer_and_no_more(door):
    door.upstream.answers[FLEET + "activate-node"] = (412, b'{"code": 1}')
    answer = door.post("activate-node", b"x" * 2**16, by="stranger")
    assert (answer.status_code, answer.content) == (412, b'{"code": 1}')
    assert door.post("deactivate-node", by="stranger").status_code == 200
    assert door.post("activate-node", b"x" * (2**16 + 1), by="stranger").status_code == 413
    before = len(door.upstream.asked)
    for call in OTHERS:
        assert door.post(call, by="stranger").status_code == 401
    assert door.pull(by="stranger").status_code == 401
    assert len(door.upstream.asked) == before


def test_the_roster_is_read_again_when_it_changes_and_kept_when_it_breaks(door, people):
    assert door.post("get-run").status_code == 200
    revoke(door.roster, "a")
    assert door.post("get-run").status_code == 401
    assert door.post("activate-node").status_code == 200  # Flower says 412: not known any more
    enroll(door.roster, name="new", key=people["stranger"].public, enrolled_patients=1)
    assert door.post("get-run", by="stranger").status_code == 200
    door.roster.write_text("{")
    assert door.post("get-run", by="stranger").status_code == 200
    assert door.post("get-run").status_code == 401
    with pytest.raises(ConfigError, match="not valid JSON"):
        Callers(door.roster)


def test_no_body_is_waited_for_without_a_key(door):
    for signed in ({}, door.people["stranger"].headers()):
        with door.connect() as connection:
            began = time.monotonic()
            connection.sendall(head("push-object", ONE_MB, signed))
            assert b" 401 " in connection.recv(4096)
            assert time.monotonic() - began < 1
    assert door.front._intake.held == 0


def test_all_bodies_together_are_bounded(tls, people, tmp_path):
    with Door(tls, people, tmp_path, Upstream()) as door:
        door.front._intake._most = ONE_MB
        with door.connect() as first:
            first.sendall(head("push-object", ONE_MB, people["a"].headers()) + b"x" * (ONE_MB - 1000))
            while door.front._intake.held < ONE_MB - 1000:
                time.sleep(0.01)
            assert door.post("get-fab", b"x" * 2000, by="b").status_code == 503
            assert door.post("get-fab", b"x" * 900, by="b").status_code == 200
        while door.front._intake.held:
            time.sleep(0.01)
        assert door.post("get-fab", b"x" * ONE_MB, by="b").status_code == 200
        assert door.front._intake.held == 0


def test_one_caller_leaves_room_for_the_others(door, monkeypatch):
    monkeypatch.setattr(front_module, "_MOST_EACH", 1)
    monkeypatch.setattr(front_module, "_STRANGERS_BODY_S", 0.5)
    with door.connect() as first, door.connect() as second:
        first.sendall(head("get-fab", 100, door.people["a"].headers()))
        second.sendall(head("activate-node", 100, door.people["stranger"].headers()))
        while door.front._open < 2:
            time.sleep(0.01)
        assert door.post("get-fab").status_code == 503
        assert door.post("get-fab", by="b").status_code == 200
        assert door.post("activate-node", by="stranger").status_code == 503
        time.sleep(0.6)  # a stranger's slow body
        assert door.post("activate-node", by="stranger").status_code == 200


def test_an_aged_signature_is_forgiven_only_to_a_caller_that_was_held_just_now(door):
    door.upstream.answers[PULL] = (401, b"{}")
    assert door.pull(held="?held=3").status_code == 401
    assert door.pull(held="?held=3", ahead_s=-400).status_code == 401
    door.upstream.answers[PULL] = [(200, message("1" * 64)), *[(401, b"{}")] * 4]
    assert door.pull().content
    assert door.pull(held="?held=3").status_code == 200
    assert door.pull(held="?held=3", ahead_s=-400).status_code == 200
    assert door.pull(held="?held=3", by="b").status_code == 401
    assert door.pull().status_code == 401
    assert door.post("get-run", ahead_s=-400).status_code == 401
    door.front._held_at = {key: at - 61 for key, at in door.front._held_at.items()}
    assert door.pull(held="?held=3").status_code == 401


def test_judging_a_caller_is_cheap(door):
    callers, headers = Callers(door.roster), [door.people["a"].headers() for _ in range(20)]
    began = time.process_time()
    assert all(callers.of(h).standing is Standing.ENROLLED for h in headers)
    assert (time.process_time() - began) / 20 < 0.02
    began = time.process_time()
    assert callers.of(headers[0]).standing is Standing.ENROLLED
    assert time.process_time() - began < 0.005
