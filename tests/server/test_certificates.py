"""Release certificates at the server: one that holds is kept, any other is warned about, receipts count."""

import json
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common import messages
from common.messages import Envelope
from common.node_keys import public_key_of
from common.statements import RELEASE_CERTIFICATE, sign_statement, verify_statement
from server.closing import _certificate_problem
from tests.server.fake_federation import FakeGrid, make_config, result_of, run, three_hospitals

KEY, OTHER_KEY = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))


def certificate(request, *, kind=RELEASE_CERTIFICATE, key=KEY, hospital="a", **changes):
    envelope = Envelope.from_record(request.content)
    content = {
        "hospital": hospital,
        "run_id": envelope.key.run_id,
        "model": {"name": "m", "sha256": envelope.key.model_hash},
    }
    return sign_statement(key, kind=kind, content=content | changes)


def closing_with(text_of):
    """Put what `text_of` makes of the request into the receipt."""

    def tamper(reply, request):
        if request.metadata.message_type == messages.CLOSING:
            reply.content[messages.RECEIPT]["certificate"] = text_of(request)
        return reply

    return tamper


def finished(tmp_path, text_of):
    folder = tmp_path / "run"
    run(make_config(folder), FakeGrid(three_hospitals(a=closing_with(text_of))))
    return folder


def test_a_certificate_that_holds_is_kept_as_it_came(tmp_path):
    sent = []
    folder = finished(tmp_path, lambda request: sent.append(certificate(request)) or sent[-1])
    assert [path.name for path in (folder / "certificates").iterdir()] == ["a.json"]
    text = (folder / "certificates" / "a.json").read_text()
    assert text == sent[-1]
    statement = verify_statement(text)
    assert statement.fingerprint == public_key_of(KEY).fingerprint
    assert statement.content["model"]["sha256"] == result_of(folder)["model"]["sha256"]


@pytest.mark.parametrize(
    "text_of",
    [
        lambda request: certificate(request).replace('"a"', '"c"'),
        lambda request: certificate(request, kind="ledger"),
        lambda request: certificate(request, hospital="b"),
        lambda request: certificate(request, run_id="another"),
        lambda request: certificate(request, model={"sha256": "0" * 64}),
        lambda request: certificate(request, model="this one"),
        lambda request: certificate(request, padding="x" * 70_000),
        lambda request: "no statement",
        lambda request: "[" * 60_000,
        lambda request: 7,
        lambda request: b"bytes",
    ],
    ids=[
        "tampered",
        "kind",
        "hospital",
        "run",
        "model",
        "shape",
        "size",
        "text",
        "nested",
        "number",
        "bytes",
    ],
)
def test_a_bad_certificate_is_not_kept_and_the_receipt_counts(tmp_path, caplog, text_of):
    folder = finished(tmp_path, text_of)
    assert not (folder / "certificates").exists()
    assert "the certificate of a is not kept" in caplog.text
    assert result_of(folder)["status"] == "completed"
    assert all(hospital["model_received"] for hospital in result_of(folder)["hospitals"])


def test_without_a_certificate_nothing_is_said(tmp_path, caplog):
    folder = finished(tmp_path, lambda request: "")
    assert not (folder / "certificates").exists()
    assert "certificate" not in caplog.text


@pytest.mark.parametrize(("key", "problem"), [(KEY, None), (OTHER_KEY, "another key than the roster's")])
def test_the_key_must_be_the_rosters(key, problem):
    entry = SimpleNamespace(fingerprint=public_key_of(KEY).fingerprint)
    federation = SimpleNamespace(
        grid=SimpleNamespace(enrolled_as={7: entry}.get),
        config=SimpleNamespace(runtime=SimpleNamespace(roster="roster.json")),
    )
    content = {"hospital": "a", "run_id": "r", "model": {"sha256": "f" * 64}}
    text = sign_statement(key, kind=RELEASE_CERTIFICATE, content=content)
    hospital = SimpleNamespace(name="a", node_id=7)
    found = _certificate_problem(federation, text, hospital, run_id="r", sha256="f" * 64)
    assert (found is None) if problem is None else problem in found
    assert json.loads(text)["kind"] == RELEASE_CERTIFICATE
