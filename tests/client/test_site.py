"""A hospital's place on its machine: who it is, its folders, its images once per process, its own log."""

import fcntl
import json
import stat
import tempfile

import pytest
from flwr.app import Context, RecordDict

from client.site import Site, open_site
from common.errors import ConfigError, FederationError
from common.hospital_config import HospitalConfig
from common.settings import load
from tests.client.small_hospital import PATIENTS, make_hospital, make_plan


def context(node_config, *, run_id=1, **run_config):
    return Context(
        run_id=run_id, node_id=7, node_config=node_config, state=RecordDict(), run_config=run_config
    )


def site_of(toml):
    return Site(load(HospitalConfig, toml), toml.parent)


@pytest.fixture
def toml(tmp_path):
    return make_hospital(tmp_path / "north")


def test_a_real_hospital_is_the_one_its_node_config_names(toml):
    site = open_site(context({"hospital-config": str(toml), "partition-id": 3}))
    assert (site.name, site.folder) == ("north", toml.parent)
    assert open_site(context({"hospital-config": str(toml)})) is site  # opened once per process


def test_a_simulated_hospital_is_found_by_its_place_on_the_roster(tmp_path):
    for name in ("west", "east"):
        make_hospital(tmp_path / name, name=name)
    (tmp_path / "roster.json").write_text(json.dumps({"hospitals": ["west", "east"]}))
    config = {"runtime.hospitals": str(tmp_path)}
    names = [open_site(context({"partition-id": n, "num-partitions": 2}, **config)).name for n in (0, 1)]
    assert names == ["west", "east"]


def test_a_node_that_is_nobody_is_told_what_to_do():
    with pytest.raises(ConfigError, match="hospital-config"):
        open_site(context({}))


def test_a_bare_flower_run_gets_its_own_phantoms_for_each_node(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sites = [
        open_site(context({"partition-id": n, "num-partitions": 2}, run_id=2**62 + 5)) for n in (0, 1, 0)
    ]
    assert [site.name for site in sites] == ["hospital-1", "hospital-2", "hospital-1"]
    assert sites[0].folder == sites[2].folder != sites[1].folder
    assert open_site(context({"partition-id": 0}, run_id=6)).folder != sites[0].folder
    plan = make_plan(data={"image-size": 28, "classes": ("normal", "opacity")})
    assert sites[0].images(plan).train.num_units == 300
    assert sites[0].images(plan).unit == "patient"


def test_folders_are_beside_the_file_and_the_owners_alone(toml):
    site = site_of(toml)
    for folder in (site.state_folder, site.cache_folder, site.ledger.folder, toml.parent / "state/outbox"):
        assert folder.parent in (toml.parent, site.state_folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_configured_folders_are_taken_from_the_files_own_place(tmp_path):
    folders = {"ledger": f"{tmp_path}/site-wide", "state": "inner/state", "cache": "../scratch"}
    site = site_of(make_hospital(tmp_path / "north", site=folders))
    assert site.ledger.folder == tmp_path / "site-wide"
    assert site.state_folder == tmp_path / "north/inner/state"
    assert site.cache_folder.resolve() == tmp_path / "scratch"


def test_two_studies_of_one_site_share_a_ledger_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "site-state"))
    lungs, hearts = (site_of(make_hospital(tmp_path / s, site={"ledger": ""})) for s in ("lungs", "hearts"))
    assert lungs.ledger.site_key == hearts.ledger.site_key
    assert lungs.ledger.folder == tmp_path / "site-state" / "hospital-federation" / "ledger"
    apart = site_of(make_hospital(tmp_path / "apart"))
    assert apart.ledger.folder == tmp_path / "apart" / "ledger"
    assert apart.ledger.site_key != lungs.ledger.site_key


def test_images_are_read_once_per_process_and_contract(toml):
    site, plan = site_of(toml), make_plan()
    images = site.images(plan)
    assert images.train.num_units == PATIENTS
    assert site.images(make_plan(federation={"rounds": 9})) is images
    larger = site.images(make_plan(data={"image-size": 12}))
    assert larger is not images
    assert larger.train.inputs["image"].shape[1:] == (1, 12, 12)


def test_who_validates_is_decided_by_the_sites_own_key(tmp_path):
    first = make_hospital(tmp_path / "one", validation_share=0.4)
    images = str(first.parent / "data" / "images.npz")
    second = make_hospital(tmp_path / "two", validation_share=0.4, data=images)
    plan = make_plan()
    kept = [frozenset(site_of(toml).images(plan).validation.unit_ids) for toml in (first, first, second)]
    assert kept[0] == kept[1] != kept[2]
    for toml, chosen in zip((first, second), kept[1:], strict=True):
        assert 0 < len(chosen) < PATIENTS
        train = site_of(toml).images(plan).train
        assert train.num_units + len(chosen) == PATIENTS
        assert chosen.isdisjoint(train.unit_ids)


def test_errors_are_logged_for_the_owner_alone_with_a_traceback_where_it_helps(toml):
    site = site_of(toml)
    try:
        raise RuntimeError("film of DOE is odd")
    except RuntimeError as error:
        site.log_locally(error)
    site.log_locally(FederationError("no film", why="the folder is empty", fix="put films there"))
    log = site.state_folder / "hospital.log"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    text = log.read_text()
    assert "film of DOE is odd" in text
    assert text.count("Traceback") == 1
    assert "put films there" in text


def test_one_round_at_a_time(toml):
    first, second = site_of(toml), site_of(toml)
    lock = second.state_folder / "site.lock"
    with first.locked(), lock.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with second.locked():
        assert lock.exists()
