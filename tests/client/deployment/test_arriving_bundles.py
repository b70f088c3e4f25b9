"""Bundles that are not the accepted one, as a server may send them: every one is refused by name."""

import hashlib

import pytest
from flwr.proto.fab_pb2 import Fab, GetFabResponse
from flwr.proto.run_pb2 import GetRunResponse

from client.deployment.supernode_process import _as_it_came, _no_config
from common import messages
from common.bundle.bundle import bundle_bytes, bundle_sha256
from common.errors import RefusalCode
from tests.client.certificates import Authority
from tests.client.deployment.running_hospital import Federation, RunningHospital, ask, wait_for
from tests.client.small_hospital import charges, training_request
from tests.deployment.relay import LyingProxy


def flipped(position: int) -> bytes:
    content = bytearray(bundle_bytes())
    content[position] ^= 1
    return bytes(content)


DIRECTORY = bundle_bytes().index(b"PK\x01\x02")
ARRIVING = {
    "start": flipped(0),
    "name": flipped(32),
    "middle": flipped(DIRECTORY // 2),
    "before the directory": flipped(DIRECTORY - 1),
    "directory": flipped(DIRECTORY),
    "inside the directory": flipped(DIRECTORY + 20),
    "end": flipped(-22),
    "cut": bundle_bytes()[:100],
    "no zip": b"no zip at all",
    "nothing": b"",
}


class BundleChanger(LyingProxy):
    """Gives hospitals another bundle than the run's; `is_honest` about its digest or not."""

    content, is_honest = b"", True

    def _truth(self, upstream, handler, body):
        digest = hashlib.sha256(self.content).hexdigest()
        if handler.path.endswith("/get-fab"):
            named = digest if self.is_honest else bundle_sha256()
            answer = GetFabResponse(fab=Fab(content=self.content, hash_str=named)).SerializeToString()
            return 200, answer, {"content-type": "application/protobuf"}
        status, answer, headers = super()._truth(upstream, handler, body)
        if handler.path.endswith("/get-run") and self.is_honest:
            message = GetRunResponse.FromString(answer)
            message.run.fab_hash = digest
            answer = message.SerializeToString()
        return status, answer, headers


@pytest.mark.faults
def test_each_is_refused_with_a_line_in_the_audit_log(tmp_path):
    with Federation(tmp_path / "server", Authority()) as server:
        folder = server.process.log.parent
        with BundleChanger(
            f"127.0.0.1:{server.port}",
            certificate=folder / "tls" / "server.crt",
            key=folder / "tls" / "server.key",
            authority=folder / "ca.crt",
        ) as proxy:
            hospital = RunningHospital(tmp_path / "north", server.authority, proxy.port)
            node = wait_for(lambda: server.register(hospital.public, "north"), within_s=30)
            hospital.start()
            try:
                hospital.await_ready()
                supernode = hospital.processes()["supernode"]
                lied = [(name, False) for name in ("start", "end", "no zip")]
                for name, is_honest in [(name, True) for name in ARRIVING] + lied:
                    proxy.content, proxy.is_honest = ARRIVING[name], is_honest
                    reply = ask(server.start_run(), node, training_request(run_id=name.replace(" ", "-")))
                    assert messages.refusal_code(reply.content) is RefusalCode.CODE, name
                lines = [line["what"] for line in hospital.audit()]
                assert lines == ["refusal code-not-accepted"] * (len(ARRIVING) + len(lied))
                assert list(charges(hospital.toml)) == []
                assert hospital.processes()["supernode"] == supernode
            finally:
                hospital.end()


@pytest.mark.parametrize("name", ARRIVING)
def test_the_supernode_does_not_look_into_it_and_calls_it_what_it_is(name):
    from flwr.supercore.run import Run

    content = ARRIVING[name]
    run = Run.create_empty(1)
    run.fab_hash = "promised"
    answer = GetFabResponse()
    answer.fab.content, answer.fab.hash_str = content, "promised"
    assert _no_config(content, run) == {}
    assert _as_it_came(answer.fab).hash_str == run.fab_hash == hashlib.sha256(content).hexdigest()
