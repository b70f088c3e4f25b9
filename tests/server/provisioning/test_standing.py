"""`flower-server status` beside a real SuperLink, and what its database looks like to the check."""

import sqlite3
import time
from contextlib import closing

import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from common.health import Health, HealthServer
from common.node_keys import load_private_key
from server.deployment.control import Control
from server.deployment.superlink import superlink_process, wait_until_healthy
from server.provisioning.backup import restore_backup, write_backup
from server.provisioning.database import DatabaseState, database_state
from server.provisioning.enrolments import enrol_hospital, revoke_hospital
from server.provisioning.presence import health_of, presence_by_fingerprint
from server.provisioning.roster import read_roster
from server.provisioning.standing import lines_of, standing_of
from tests.server.provisioning.federations import flower_server, public_key, small_federation


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """A federation whose SuperLink runs, with two keys that Flower knows."""
    tmp = tmp_path_factory.mktemp("standing")
    folder = small_federation(tmp / "op")
    for name in ("north", "south", "gone"):
        enrol_hospital(folder, name=name, key=public_key(tmp, name), enrolled_patients=400)
    revoke_hospital(folder, "gone")
    superlink = superlink_process(folder, folder.config())
    superlink.start()
    try:
        wait_until_healthy(superlink, folder, folder.config(), stop=lambda: False)
        yield folder
    finally:
        superlink.stop(patience_s=5)


@pytest.fixture(scope="module")
def registered(federation):
    authority = federation.ca_certificate.read_bytes()
    with Control(federation.config().network.superlink_port, authority=authority) as control:
        control.enforce([entry for entry in read_roster(federation.roster) if entry.name == "north"])
    return federation


def test_hospitals_that_never_came_are_not_connected(registered):
    config = registered.config()
    assert [
        (presence.online, presence.last_seen)
        for presence in presence_by_fingerprint(registered, config).values()
    ] == [(False, None)]


def test_a_connected_hospital_is_online_with_its_last_heartbeat(registered):
    key = load_private_key(registered.path.parent / "north.key")
    signed = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(key, key.public_key()),
    ]
    config = registered.config()
    request = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=30)
    before = time.time()
    with FleetHttpClient.from_server_address(
        f"127.0.0.1:{config.network.superlink_port}",
        False,
        registered.ca_certificate.read_bytes(),
        interceptors=signed,
    ) as fleet:
        node_id = fleet.ActivateNode(request).node_id
        (presence,) = presence_by_fingerprint(registered, config).values()
        assert presence.online
        assert before - 1 <= presence.last_seen <= time.time() + 1
        fleet.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
        (presence,) = presence_by_fingerprint(registered, config).values()
        assert not presence.online
        assert before - 1 <= presence.last_seen <= time.time() + 1


def test_status_joins_health_roster_and_connections(registered):
    health = HealthServer(registered.config().network.health_port)
    health.start()
    try:
        for service in ("", "superlink", "front"):
            health.set(service, serving=True)
        assert health_of(registered.config()) == {
            "server": Health.SERVING,
            "superlink": Health.SERVING,
            "open path": Health.SERVING,
            "run": Health.UNKNOWN,
        }
        standing = standing_of(registered)
        rows = {row["name"]: row for row in standing["roster"]}
        assert (rows["north"]["online"], rows["south"]["online"]) == (False, False)
        assert rows["gone"]["revoked_at"] is not None
        assert "superlink serving" in lines_of(standing)[1]
        shown = flower_server("status", "--dir", registered.path)
        assert shown.returncode == 0
        assert "open path serving" in shown.stdout
        assert "revoked" in shown.stdout
    finally:
        health.stop()
    assert "not running" in lines_of(standing_of(registered))[1]
    assert {row["online"] for row in standing_of(registered)["roster"]} == {None}


def test_the_database_of_this_flower_is_current_and_another_schema_is_not(registered, tmp_path):
    assert database_state(registered.database) is DatabaseState.CURRENT
    write_backup(registered, tmp_path / "b.tar.gz")  # while the SuperLink has it open
    back = restore_backup(tmp_path / "b.tar.gz", tmp_path / "back").database
    assert database_state(back) is DatabaseState.CURRENT
    with closing(sqlite3.connect(back)) as database:
        before = database.execute("SELECT version_num FROM alembic_version").fetchone()[0]
        database.execute("UPDATE alembic_version SET version_num = '8e65d8ae60b0'")
        database.commit()
        assert database_state(back) is DatabaseState.OLDER
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
        database.commit()
        assert database_state(back) is DatabaseState.UNKNOWN
        database.execute("DROP TABLE alembic_version")
        database.commit()
        assert database_state(back) is DatabaseState.UNKNOWN
    assert before
    assert database_state(tmp_path / "nothing") is DatabaseState.MISSING
