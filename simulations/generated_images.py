"""Generated images for a scenario without `--data`: single films, or visits of patients who come again."""

from dataclasses import replace

import numpy as np

from client.images.decoded import DecodedRecords
from client.images.phantom_visits import MOST_VISITS, hospital_visits
from client.images.phantoms import PhantomSet, hospital_phantoms
from client.images.series_rows import as_visits, series_examples
from common.errors import ConfigError
from common.examples import Examples, concatenate
from common.preprocessing import Preprocessing
from common.series_form import SINGLE_IMAGES, SeriesForm
from common.task_kinds import ONE_CLASS_EACH, PROGRESSION
from simulations.asked_preprocessing import asked_preprocessing, fitted_phantoms
from simulations.partition import slug
from simulations.scenario import DEFAULT_HOSPITALS, Scenario

PHANTOM_SIZE = 32
VISITS_SIZE = 20
"""Many films of each patient: small ones keep a run short."""
PHANTOM_PATIENTS = 400
"""Patients of each generated hospital."""
_SMALLEST = 16


def generate(scenario: Scenario) -> tuple[DecodedRecords, Preprocessing, SeriesForm]:
    """Chest phantoms of several hospitals, each with its own scanner. Raises ConfigError."""
    spec = scenario.partition_spec
    if spec.finds_hospitals and spec.column != "site":
        raise ConfigError(
            f"generated images have no column {spec.column!r}",
            fix="use --partition column:site, or name --data",
        )
    if scenario.task_name not in ONE_CLASS_EACH:
        raise ConfigError(
            f"generated images have no labels for a task {scenario.task_name}",
            why="each phantom has one finding or none",
            fix="name --data, or leave --task out",
        )
    preprocessing = asked_preprocessing(
        scenario,
        image_size=scenario.image_size or (PHANTOM_SIZE if scenario.series == "none" else VISITS_SIZE),
        channels=scenario.channels or 1,
    )
    draw = hospital_phantoms if scenario.series == "none" else hospital_visits
    sites = [
        draw(
            hospital=number,
            num_patients=PHANTOM_PATIENTS,
            image_size=max(_SMALLEST, preprocessing.image_size),
            seed=scenario.seed,
        )
        for number in range(1, (scenario.hospitals or DEFAULT_HOSPITALS) + 1)
    ]
    examples = concatenate([_examples(site, preprocessing) for site in sites])
    decoded = DecodedRecords(
        examples=examples,
        classes=sites[0].classes,
        unit="patient",
        unit_splits=("",) * examples.num_units,
        groups={"site": tuple(slug(site.site) for site in sites for _ in site.patients)},
        skipped=(),
        units_in_several_splits=0,
        repeated_images=0,
        layout="generated chest phantoms",
    )
    if scenario.series == "none":
        return decoded, preprocessing, SINGLE_IMAGES
    next_finding = scenario.task_name == PROGRESSION
    most = MOST_VISITS - 1 if next_finding else MOST_VISITS
    form = SeriesForm(kind="visits", steps=scenario.steps or most, next_finding=next_finding)
    days = tuple(str(day) for site in sites for day in site.days or ())
    decoded = replace(decoded, groups=as_visits(decoded, "days", days))
    return series_examples(decoded, form), preprocessing, form


def _examples(site: PhantomSet, preprocessing: Preprocessing) -> Examples:
    number_of = {patient: number for number, patient in enumerate(dict.fromkeys(site.patients))}
    return Examples(
        inputs={"image": fitted_phantoms(site.images, preprocessing)},
        targets=site.labels,
        units=np.array([number_of[patient] for patient in site.patients], np.int64),
        unit_ids=tuple(number_of),
    )
