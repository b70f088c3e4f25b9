"""Settings: refused with key, value and remedy; equal after TOML, JSON text and Flower's run config."""

import tomllib
from typing import get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from common.config import FederationConfig, PrivacyKnobs, PublicPlan, TrainingConfig
from common.errors import ConfigError
from common.hospital_config import HospitalConfig, HospitalSection, PolicyConfig
from common.preparation.settings import PreprocessingSection
from common.settings import from_flat, load, meaning, parse, to_flat, to_nested, to_toml, with_overrides

HOSPITAL = {"hospital": {"name": "north", "enrolled-patients": 100}, "data": {"path": "films"}}


def refused(kind, values, source="federation.toml"):
    with pytest.raises(ConfigError) as failure:
        parse(kind, values, source=source)
    lines = str(failure.value).splitlines()
    assert 1 < len(lines) <= 3, "what, why, what to do"
    return failure.value


# --- refusals name key, value and remedy ---


@pytest.mark.parametrize(
    ("values", "key", "near"),
    [
        ({"training": {"learning-rat": 1}}, "training.learning-rat", "did you mean training.learning-rate?"),
        ({"privacy": {"clip": 1}}, "privacy.clip", "privacy."),
        ({"policy": {"epsilon": 1}}, "policy", "known keys"),
        ({"sever": {"quorum": 2}}, "sever", "server."),
    ],
)
def test_an_unknown_setting_is_refused_with_a_likely_one(values, key, near):
    error = refused(FederationConfig, values)
    assert f"no setting {key}" in error.what
    assert near in error.fix


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("federation", "rounds", 0),
        ("federation", "rounds", 2.5),
        ("federation", "rounds", "many"),
        ("federation", "seed", -1),
        ("federation", "private", "perhaps"),
        ("federation", "name", "../elsewhere"),
        ("federation", "name", ""),
        ("data", "task", "guessing"),
        ("data", "channels", 2),
        ("data", "image-size", 7),
        ("data", "unit", "hospital"),
        ("training", "optimizer", "lion"),
        ("training", "learning-rate", 0.0),
        ("training", "learning-rate", float("nan")),
        ("training", "learning-rate", float("inf")),
        ("training", "momentum", 1.0),
        ("training", "physical-batch-size", 0),
        ("privacy", "sampling-rate", 0.0),
        ("privacy", "sampling-rate", 1.01),
        ("privacy", "l2-clip-norm", -1.0),
        ("privacy", "local-steps", 0),
        ("privacy", "minimum-noise-multiplier", -0.1),
        ("server", "keep-checkpoints", 1),
        ("server", "update-norm-factor", 1.0),
        ("server", "ema-decay", 1.0),
        ("server", "patience-s", 0.0),
    ],
)
def test_an_impossible_value_is_refused_with_its_meaning(section, key, value):
    error = refused(FederationConfig, {section: {key: value}})
    assert f"{section}.{key} = {value!r}" in error.what
    assert error.why
    assert error.fix.startswith(f"{section}.{key}: ")


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (FederationConfig, {"data": {"classes": ["one"]}}, "two distinct classes"),
        (FederationConfig, {"data": {"classes": ["one", "one"]}}, "two distinct classes"),
        (
            FederationConfig,
            {"data": {"series": "visits", "steps": 3}, "augmentation": {"flip": "both"}},
            "changes single images",
        ),
        (
            FederationConfig,
            {"data": {"series": "visits", "steps": 3, "task": "ordinal"}, "training": {"loss": "bce"}},
            "'ordinal' has no series",
        ),
        (FederationConfig, {"server": {"final-model": "ema"}}, "ema-decay above 0"),
        (HospitalConfig, {**HOSPITAL, "policy": {"mode": "fixed"}}, "noise-multiplier, for example"),
        (HospitalConfig, {**HOSPITAL, "policy": {"minimum-noise-multiplier": 501.0}}, "is above"),
        (HospitalConfig, {**HOSPITAL, "policy": {"epsilon": 0}}, "greater than 0"),
        (HospitalConfig, {**HOSPITAL, "policy": {"delta": 1.0}}, "less than 1"),
        (HospitalConfig, {"data": {"path": "films"}}, "required"),
        (HospitalConfig, {**HOSPITAL, "hospital": {"name": "a b", "enrolled-patients": 1}}, "pattern"),
        (HospitalConfig, {**HOSPITAL, "site": {"device": "tpu"}}, "pattern"),
    ],
)
def test_impossible_combinations_are_refused_on_construction(kind, values, words):
    assert words in refused(kind, values).why


def test_a_frozen_section_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        TrainingConfig().learning_rate = 0.1


def test_the_ledger_belongs_to_the_site_and_not_to_one_study(tmp_path, monkeypatch):
    north = parse(HospitalConfig, HOSPITAL, source="t")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert north.ledger_folder(tmp_path / "lungs") == north.ledger_folder(tmp_path / "hearts")
    assert north.ledger_folder(tmp_path / "lungs").is_relative_to(tmp_path)
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert north.ledger_folder(tmp_path / "lungs").is_relative_to(tmp_path / "home")
    own = parse(HospitalConfig, {**HOSPITAL, "site": {"ledger": "../ledger"}}, source="t")
    assert own.ledger_folder(tmp_path / "lungs") == tmp_path / "lungs" / "../ledger"


def test_delta_is_a_tenth_of_the_enrolled_count_unless_the_policy_says_less():
    north = parse(HospitalConfig, HOSPITAL, source="t")
    assert north.delta == 1 / 1000
    strict = {**HOSPITAL, "policy": {"delta": 1e-6}}
    assert parse(HospitalConfig, strict, source="t").delta == 1e-6


@pytest.mark.parametrize(
    ("asked", "claims"),
    [({}, True), ({"private": False}, False), ({"reproducible": True}, False)],
)
def test_privacy_is_claimed_only_for_private_runs_with_secret_noise(asked, claims):
    assert parse(PublicPlan, {"federation": asked}, source="t").claims_privacy is claims


def test_the_public_plan_holds_nothing_of_the_servers_own():
    config = parse(
        FederationConfig,
        {"runtime": {"run-folder": "/srv/runs/x", "hospitals": "/srv/h"}, "server": {"quorum": 3}},
        source="t",
    )
    flat = to_flat(config.public_plan)
    assert {key.split(".")[0] for key in flat} == {
        "federation",
        "augmentation",
        "data",
        "model",
        "training",
        "preprocessing",
        "privacy",
        "evaluation",
        "wire",
    }
    assert "/srv" not in str(flat)


def test_knobs_of_privacy_and_of_training_share_no_name():
    assert not set(TrainingConfig.model_fields) & (
        set(PrivacyKnobs.model_fields) | set(PolicyConfig.model_fields)
    )


def sections_of(kind):
    yield kind
    for field in kind.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections_of(field.annotation)


@pytest.mark.parametrize("kind", [FederationConfig, HospitalConfig])
def test_every_setting_says_what_it_means(kind):
    for section in sections_of(kind):
        for name, field in section.model_fields.items():
            is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            assert is_section or meaning(section, name), f"{section.__name__}.{name}"


# --- files and --set ---


def test_a_file_is_read_and_overridden(tmp_path):
    path = tmp_path / "federation.toml"
    path.write_text("[federation]\nrounds = 9\n[training]\nlearning-rate = 0.1\n")
    config = load(FederationConfig, path, ["training.learning_rate=0.25", "data.classes=['a', 'b']"])
    assert (config.federation.rounds, config.training.learning_rate) == (9, 0.25)
    assert config.data.classes == ("a", "b")


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no file"), ("[federation\n", "line 1"), ("rounds = 3\n", "rounds")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, words):
    path = tmp_path / "federation.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"federation\.toml") as failure:
        load(FederationConfig, path)
    assert words in str(failure.value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("federation.rounds=3", 3),
        ("federation.rounds = 3", 3),
        ("federation.name=lungs", "lungs"),
        ('federation.name="lungs"', "lungs"),
        ("federation.private=false", False),
        ("training.learning-rate=1e-3", 0.001),
        ("data.classes=['a', 'b']", ["a", "b"]),
        ("runtime.run-folder=a=b", "a=b"),
        ("runtime.run-folder=", ""),
    ],
)
def test_set_reads_values_as_toml_else_as_text(override, value):
    section, key = override.split("=")[0].strip().split(".")
    assert with_overrides({}, [override])[section][key] == value


def test_set_keeps_what_it_does_not_name_and_changes_no_argument():
    values = {"training": {"momentum": 0.5, "learning-rate": 1.0}}
    changed = with_overrides(values, ["training.learning-rate=2.0", "server.quorum=2"])
    assert changed == {"training": {"momentum": 0.5, "learning-rate": 2.0}, "server": {"quorum": 2}}
    assert values == {"training": {"momentum": 0.5, "learning-rate": 1.0}}


@pytest.mark.parametrize("override", ["federation.rounds", "=3", "", "federation.rounds.more=3"])
def test_set_without_key_or_value_is_refused(override):
    with pytest.raises(ConfigError) as failure:
        with_overrides({"federation": {"rounds": 2}}, [override])
    assert failure.value.fix


def test_later_overrides_win():
    assert with_overrides({}, ["federation.rounds=1", "federation.rounds=2"]) == {"federation": {"rounds": 2}}


# --- Flower's run config ---


@pytest.mark.parametrize(
    "text", ['["a", ', "[", "[" * 100_000, "['a', 'b']", "a, b", '["a"] ["b"]', ""], ids=lambda t: t[:12]
)
def test_text_that_is_no_list_is_refused_by_name(text):
    with pytest.raises(ConfigError, match=r"data\.classes") as failure:
        from_flat(PublicPlan, {"data.classes": text})
    assert failure.value.fix
    assert len(str(failure.value)) < 400


@pytest.mark.parametrize("text", ['"ab"', '{"a": "b"}', "[1, 2]", '[["a"], ["b"]]', "null", "7"])
def test_a_list_of_other_things_is_refused(text):
    with pytest.raises(ConfigError, match=r"data\.classes"):
        from_flat(PublicPlan, {"data.classes": text})


def test_a_text_that_begins_like_a_list_stays_a_text():
    config = parse(FederationConfig, {"runtime": {"run-folder": "[old] runs/7"}}, source="t")
    assert from_flat(FederationConfig, to_flat(config)) == config


def test_missing_keys_take_their_defaults_and_unknown_ones_are_refused():
    assert from_flat(FederationConfig, {}) == FederationConfig()
    with pytest.raises(ConfigError, match="no setting"):
        from_flat(FederationConfig, {"federation.round": 3})
    with pytest.raises(ConfigError, match="not a section"):
        from_flat(FederationConfig, {"federation": "x", "federation.rounds": 3})


def test_flower_accepts_every_value_of_a_run_config():
    assert {type(value) for value in to_flat(FederationConfig()).values()} <= {str, int, float, bool}


# --- round trips ---


def values_for(annotation, field):
    """Any value that the field allows."""
    if get_origin(annotation) is tuple:
        if choices := get_args(get_args(annotation)[0]):
            return st.lists(st.sampled_from(choices), max_size=3).map(tuple)
        return st.lists(st.text(min_size=1), min_size=2, max_size=5, unique=True).map(tuple)
    if choices := [arg for arg in get_args(annotation) if not isinstance(arg, type)]:
        return st.sampled_from(choices)
    limits = {
        name: getattr(m, name)
        for m in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(m, name)
    }
    if any(hasattr(m, "pattern") for m in field.metadata):
        if "sensitivity" in str(field.metadata):
            return st.sampled_from(["balanced", "sensitivity:0.95", "0.5", ".25"])
        return st.sampled_from(
            ["auto", "cpu", "cuda:1"] if "cuda" in str(field.metadata) else ["a", "B-2.x_y"]
        )
    types = get_args(annotation) or (annotation,)
    if bool in types:
        return st.booleans()
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    if int in types:
        return st.integers(low, high if high is not None else 2**53)
    if float in types:
        return st.floats(
            low,
            high,
            exclude_min="gt" in limits,
            exclude_max="lt" in limits,
            allow_nan=False,
            allow_infinity=False,
        )
    assert str in types, annotation
    return st.text()


# Most combinations of steps are impossible; tests/common/preparation says which.
STEPS = (
    {},
    {"crop": "centre", "crop_share": 0.75, "resize": "pad"},
    {"clip_percentiles": (0.5, 99.5), "mask": "body", "crop": "foreground", "crop_margin": 0.1},
    {"denoise": "median", "denoise_strength": 2.0, "clahe": 0.01, "clahe_tiles": 2},
    {"colour": "refuse", "mean": (0.4,), "standard_deviation": (0.2,)},
    {"standardise": "none", "denoise": "non-local-means"},
)


def configs(kind):
    if kind is PreprocessingSection:
        return st.sampled_from([PreprocessingSection(**steps) for steps in STEPS])
    fields = {}
    for name, field in kind.model_fields.items():
        annotation = field.annotation
        nested = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        fields[name] = configs(annotation) if nested else values_for(annotation, field)
    return (
        st.fixed_dictionaries(fields)
        .map(lambda values: construct(kind, values))
        .filter(lambda c: c is not None)
    )


def construct(kind, values):
    """The settings, with as few of them left out as make the combination possible; None where none does."""
    kept = dict(values)
    for name in [None, *reversed([field for field in values if field not in ("federation", "data")])]:
        kept = _without(kept, name)
        for tried in (_without(values, name), kept):
            try:
                return kind(**tried)
            except ValueError:
                continue
    return None


def _without(values, name):
    return {key: value for key, value in values.items() if key != name}


@settings(max_examples=60, deadline=None)
@given(configs(FederationConfig))
def test_a_federations_settings_survive_flower_and_toml(config):
    assert from_flat(FederationConfig, to_flat(config)) == config
    assert from_flat(PublicPlan, to_flat(config.public_plan)) == config.public_plan
    assert parse(FederationConfig, tomllib.loads(to_toml(config)), source="t") == config


@settings(max_examples=60, deadline=None)
@given(configs(HospitalConfig))
def test_a_hospitals_settings_survive_toml(config):
    assert parse(HospitalConfig, tomllib.loads(to_toml(config)), source="t") == config
    assert parse(HospitalConfig, to_nested(config), source="t") == config


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*to_flat(FederationConfig()), "federation", "x", "data.classes.0", "."]),
        st.one_of(
            st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.just("[1"), st.binary()
        ),
        max_size=4,
    )
)
def test_whatever_a_run_config_holds_is_a_configuration_or_a_config_error(flat):
    try:
        config = from_flat(FederationConfig, flat)
    except ConfigError:
        return
    assert isinstance(config, FederationConfig)


@pytest.mark.parametrize("name", ["a", "x" * 64, "St-Mary_2.b"])
def test_names_of_hospitals_are_plain(name):
    assert HospitalSection(name=name, enrolled_patients=1).name == name
