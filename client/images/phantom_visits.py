"""Generated series: chest films of patients who come again, with an opacity that grows, stays or shrinks.

What is planted: every patient has one opacity and one trend. Its radius changes by a rate of the patient's
own (`_RATES`, coordinate units a year) and a little at random (`_UNREST`) from visit to visit; visits are
2 to 6 and lie `_GAPS` days apart. A visit is `worse` where the radius grew by more than `_WORSE` since the
visit before. The radius at the last but one visit, the newest film of whoever foretells the last one, is
drawn first and hardly depends on the trend (`_HINT`): alone it tells little, beside the films before it much.
Everything else, from the ribs to the scanner's noise, is as in `client.images.phantoms`.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from client.images.phantoms import (
    LARGEST_IMAGE,
    MAX_OPACITIES,
    SMALLEST_IMAGE,
    PhantomSet,
    Scanner,
    draw_anatomy,
    draw_poses,
    opacity_boxes,
    take_films,
)

CLASSES: Final = ("not-worse", "worse")
MOST_VISITS: Final = 6
_VISITS: Final = (2, 3, 4, 5, 6)
_VISIT_SHARES: Final = (0.10, 0.20, 0.25, 0.25, 0.20)
_TRENDS: Final = (1, 0, -1)
_TREND_SHARES: Final = (0.45, 0.20, 0.35)
_RATES: Final = (0.25, 0.50)
_GAPS: Final = (45, 240)
_RADIUS: Final = (0.20, 0.42)
_HINT: Final = 0.0125
_UNREST: Final = 0.010
_WORSE: Final = 0.02
_LEAST_RADIUS, _MOST_RADIUS = 0.05, 0.62
_DENSITY: Final = (0.42, 0.50)


@dataclass(frozen=True, kw_only=True)
class Course:
    """What happens to the opacities of a hospital's patients, visit after visit."""

    patient_of: NDArray[np.int64]
    """(visits,) never decreasing."""
    days: NDArray[np.int64]
    """(visits,) since the patient's first visit."""
    radius: NDArray[np.float64]
    """(visits,) of the opacity, in coordinate units (a film is 2 wide)."""
    labels: NDArray[np.int64]
    """(visits,) index into `CLASSES`; a first visit is not worse than anything."""


def draw_course(*, num_patients: int, rng: np.random.Generator) -> Course:
    """Draw trends, visits and radii."""
    count = rng.choice(_VISITS, size=num_patients, p=_VISIT_SHARES)
    trend = rng.choice(_TRENDS, size=num_patients, p=_TREND_SHARES)
    rate = trend * rng.uniform(*_RATES, size=num_patients)
    anchor = rng.uniform(*_RADIUS, size=num_patients) + _HINT * trend
    patient_of = np.repeat(np.arange(num_patients), count)
    days = np.zeros(len(patient_of), np.int64)
    radius = np.zeros(len(patient_of))
    labels = np.zeros(len(patient_of), np.int64)
    ends = np.cumsum(count)
    for patient, (begin, end) in enumerate(zip(ends - count, ends, strict=True)):
        gaps = rng.integers(_GAPS[0], _GAPS[1], size=end - begin, endpoint=True)
        gaps[0] = 0
        came = np.cumsum(gaps)
        steps = rate[patient] * np.diff(came) / 365.25 + rng.normal(0, _UNREST, size=len(came) - 1)
        walk = np.concatenate([[0.0], np.cumsum(steps)])
        sizes = np.clip(anchor[patient] + walk - walk[-2], _LEAST_RADIUS, _MOST_RADIUS)
        days[begin:end], radius[begin:end] = came, sizes
        labels[begin + 1 : end] = np.diff(sizes) > _WORSE
    return Course(patient_of=patient_of, days=days, radius=radius, labels=labels)


def hospital_visits(*, hospital: int, num_patients: int, image_size: int, seed: int) -> PhantomSet:
    """Draw the patients of one hospital and their films, patient after patient and visit after visit.

    The same arguments give the same pixels on the same machine. `image_size` is 16 to 1024 pixels. Raises
    ValueError.
    """
    if hospital < 0 or seed < 0 or num_patients < 1 or not SMALLEST_IMAGE <= image_size <= LARGEST_IMAGE:
        raise ValueError(
            f"expected hospital, seed >= 0, num_patients >= 1, {SMALLEST_IMAGE} to {LARGEST_IMAGE} pixels; "
            f"got {hospital, seed, num_patients, image_size}"
        )
    # Other streams than those of single films: hospital 1 has other patients here.
    people, poses, grain, fate = (np.random.default_rng((seed, hospital, 16 + stream)) for stream in range(4))
    course = draw_course(num_patients=num_patients, rng=fate)
    anatomy = draw_anatomy(people, np.ones(num_patients, np.bool_))
    chests = {name: values[course.patient_of] for name, values in anatomy.items()}
    chests |= _one_opacity(course, num_patients, fate)
    pose = draw_poses(poses, len(course.patient_of))
    scanner = Scanner.of_hospital(hospital)
    return PhantomSet(
        images=take_films(chests, pose, scanner, image_size=image_size, grain=grain),
        labels=course.labels,
        patients=tuple(f"visits-h{hospital}-p{patient:04d}" for patient in course.patient_of),
        site=f"phantom-hospital-{hospital}",
        opacity_boxes=opacity_boxes(chests, pose, image_size),
        scanner=scanner,
        days=tuple(course.days.tolist()),
        classes=CLASSES,
    )


def _one_opacity(
    course: Course, num_patients: int, rng: np.random.Generator
) -> dict[str, NDArray[np.float32]]:
    """Where each patient's opacity is, how dense, and how large at each visit: (visits, MAX_OPACITIES)."""
    side = np.where(rng.random(num_patients) < 0.5, -1, 1)
    place = {
        "opacity_x": side * rng.uniform(0.30, 0.42, num_patients) + 0.03,
        "opacity_y": rng.uniform(-0.30, 0.10, num_patients),
        "opacity_stretch": rng.uniform(0.85, 1.18, num_patients),
        "opacity_density": rng.uniform(*_DENSITY, num_patients),
    }
    columns = {name: values[course.patient_of] for name, values in place.items()}
    columns["opacity_radius"] = course.radius
    shape = (len(course.patient_of), MAX_OPACITIES)
    slots: dict[str, NDArray[np.float32]] = {}
    for name, values in columns.items():
        # The slots that nobody uses have density 0, and lengths that can be divided by.
        empty = 0.0 if name == "opacity_density" else 1.0
        slots[name] = np.full(shape, empty, np.float32)
        slots[name][:, 0] = values
    return slots
