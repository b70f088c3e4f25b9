"""Generated chest films: drawn from a seed, learnable, and nobody's.

A phantom is a sum of tissue densities (body, lungs, heart, spine, ribs, opacities), which a radiograph shows
as brightness; the hospital's scanner then blurs it, sets its contrast and adds noise. Coordinates run from -1
to 1, x to the right of the picture, y down; all lengths are in these units, so every picture size shows the
same chest. Why this stands in `client`: docs/decisions/0001-phantoms-live-with-the-client.md.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from client.images.phantom_scanner import Scanner, pixel_centres, scan

__all__ = ["Scanner"]

CLASSES: Final = ("normal", "opacity")
MAX_IMAGES_PER_PATIENT: Final = 4
MAX_OPACITIES: Final = 3
SMALLEST_IMAGE, LARGEST_IMAGE = 16, 1024

_Floats = NDArray[np.float32]
_IMAGES_SHARES: Final = (0.45, 0.30, 0.15, 0.10)  # patients with 1, 2, 3, 4 images
_TEXTURE_NODES: Final = 14
_PIXELS_AT_ONCE: Final = 1 << 17  # keeps the temporary arrays in the processor's cache


@dataclass(frozen=True, kw_only=True)
class PhantomSet:
    """The generated images of one hospital, patient after patient."""

    images: NDArray[np.uint8]
    """(images, size, size), grey."""
    labels: NDArray[np.int64]
    """(images,), index into `CLASSES`; one label per patient."""
    patients: tuple[str, ...]
    """Patient of each image, such as `phantom-h2-p0013`."""
    site: str
    """The hospital, such as `phantom-hospital-2`."""
    opacity_boxes: NDArray[np.int64]
    """(images, MAX_OPACITIES, 4): left, top, right, bottom in pixels, ends excluded; zeros where none is."""
    scanner: Scanner
    """The machine that took the images."""
    days: tuple[int, ...] | None = None
    """Day of each image since the patient's first; None where the images of a patient have no order."""
    classes: tuple[str, ...] = CLASSES


def hospital_phantoms(
    *, hospital: int, num_patients: int, image_size: int, seed: int, prevalence: float = 0.5
) -> PhantomSet:
    """Draw the patients of one hospital and their films.

    The same arguments give the same pixels on the same machine, in any process. `image_size` is 16 to 1024
    pixels; round(prevalence * num_patients) patients have one to three opacities. Raises ValueError.
    """
    if hospital < 0 or seed < 0 or num_patients < 1:
        raise ValueError(
            f"expected hospital, seed >= 0 and num_patients >= 1, got {hospital, seed, num_patients}"
        )
    if not SMALLEST_IMAGE <= image_size <= LARGEST_IMAGE:
        raise ValueError(f"image_size must be {SMALLEST_IMAGE} to {LARGEST_IMAGE} pixels, got {image_size}")
    if not 0 <= prevalence <= 1:
        raise ValueError(f"prevalence must be 0 to 1, got {prevalence}")
    people, poses, grain = (np.random.default_rng((seed, hospital, stream)) for stream in range(3))

    is_positive = people.permutation(num_patients) < round(prevalence * num_patients)
    anatomy = draw_anatomy(people, is_positive)
    num_images = people.choice(MAX_IMAGES_PER_PATIENT, size=num_patients, p=_IMAGES_SHARES) + 1
    patient_of = np.repeat(np.arange(num_patients), num_images)
    pose = draw_poses(poses, len(patient_of))
    scanner = Scanner.of_hospital(hospital)

    chests = {name: values[patient_of] for name, values in anatomy.items()}
    return PhantomSet(
        images=take_films(chests, pose, scanner, image_size=image_size, grain=grain),
        labels=is_positive[patient_of].astype(np.int64),
        patients=tuple(f"phantom-h{hospital}-p{patient:04d}" for patient in patient_of),
        site=f"phantom-hospital-{hospital}",
        opacity_boxes=opacity_boxes(chests, pose, image_size),
        scanner=scanner,
    )


def take_films(
    chests: dict[str, _Floats],
    pose: dict[str, _Floats],
    scanner: Scanner,
    *,
    image_size: int,
    grain: np.random.Generator,
) -> NDArray[np.uint8]:
    """(images, size, size): each row of `chests`, in its pose, through the scanner."""
    images = np.empty((len(pose["zoom"]), image_size, image_size), np.uint8)
    step = max(1, _PIXELS_AT_ONCE // image_size**2)
    for start in range(0, len(images), step):
        rows = slice(start, start + step)
        films = _densities(
            {name: values[rows] for name, values in chests.items()},
            {name: values[rows] for name, values in pose.items()},
            image_size,
        )
        images[rows] = scan(films, scanner, grain)
    return images


def draw_anatomy(rng: np.random.Generator, is_positive: NDArray[np.bool_]) -> dict[str, _Floats]:
    """Shape of each patient's chest and its opacities: (patients,), opacities (patients, MAX_OPACITIES)."""
    patients = len(is_positive)

    def between(low: float, high: float, *more: int) -> _Floats:
        return rng.uniform(low, high, size=(patients, *more)).astype(np.float32)

    anatomy = {
        "body_width": between(0.80, 0.98),
        "softness": between(0.55, 0.63),  # density of the soft tissue around the lungs: slim to heavy
        "lung_top": between(-0.84, -0.66),
        "lung_bottom": between(0.40, 0.68),
        "lung_outer": between(0.66, 0.78),
        "lung_inner": between(0.10, 0.17),
        "lung_air": between(0.33, 0.39),  # density that air takes away
        "asymmetry": between(-0.05, 0.05),
        "right_dome": between(0.0, 0.10),  # the liver lifts the right half of the diaphragm
        "heart_size": between(0.24, 0.36),
        "heart_x": between(0.06, 0.18),
        "heart_density": between(0.16, 0.26),
        "rib_spacing": between(0.17, 0.22),
        "rib_start": between(0.0, 1.0),
        "rib_slope": between(0.18, 0.40),
        "rib_density": between(0.04, 0.10),
        "hilum": between(0.04, 0.12),
        "texture": rng.normal(0, 0.04, size=(patients, _TEXTURE_NODES, _TEXTURE_NODES)).astype(np.float32),
    }
    slots = MAX_OPACITIES
    count = rng.choice(slots, size=patients, p=(0.35, 0.35, 0.3)) + 1
    present = is_positive[:, None] & (np.arange(slots) < count[:, None])
    side = np.where(rng.random((patients, slots)) < 0.5, -1, 1).astype(np.float32)
    # Small and faint ones are the difficult patients: squares of uniform draws make them common.
    difficulty = rng.random((patients, slots)).astype(np.float32)
    return anatomy | {
        "opacity_x": side * between(0.27, 0.52, slots) + 0.03,
        "opacity_y": between(-0.45, 0.24, slots),
        "opacity_radius": 0.15 + 0.25 * (1 - difficulty) * between(0.4, 1.0, slots),
        "opacity_stretch": between(0.7, 1.4, slots),
        "opacity_density": present * (0.20 + 0.30 * (1 - difficulty) * between(0.5, 1.0, slots)),
    }


def draw_poses(rng: np.random.Generator, images: int) -> dict[str, _Floats]:
    """How the patient stood and was exposed in each image: (images,)."""
    spreads = {
        "shift_x": (0.0, 0.06),
        "shift_y": (0.0, 0.06),
        "zoom": (1.0, 0.05),
        "tilt": (0.0, 0.03),
        "breath": (0.0, 0.03),
        "exposure": (0.0, 0.012),
        "gain": (1.0, 0.03),
    }
    return {name: rng.normal(*spread, size=images).astype(np.float32) for name, spread in spreads.items()}


def _ramp(distance: _Floats, width: float) -> _Floats:
    """0 outside, 1 inside, a straight edge of `width` around distance 0."""
    ramp = distance * np.float32(1 / width)
    ramp += np.float32(0.5)
    return np.clip(ramp, 0, 1, out=ramp)


def _densities(chests: dict[str, _Floats], pose: dict[str, _Floats], size: int) -> _Floats:
    """Density of each pixel, (images, size, size), about 0 (air) to 1; `chests` has one row per image."""
    c = {name: values[:, None, None] for name, values in chests.items() if values.ndim == 1}
    p = {name: values[:, None, None] for name, values in pose.items()}
    # y differs by row only; functions of y alone cost one column instead of a picture.
    y = (pixel_centres(size)[None, :, None] - p["shift_y"]) / p["zoom"]
    x = (pixel_centres(size)[None, None, :] - p["shift_x"]) / p["zoom"] + p["tilt"] * y
    side = np.sign(x)
    across = np.abs(x) * (1 + c["asymmetry"] * side)

    # 1. Torso: neck, shoulders, and flanks that thin out towards the skin.
    torso_edge = 0.28 + (c["body_width"] - 0.28) * _ramp(y + 0.80, 0.35)
    thickness = across / torso_edge
    thickness *= thickness
    thickness *= thickness
    density: _Floats = _ramp(torso_edge - across, 0.06) * c["softness"] * (1.08 - 0.35 * thickness)
    # 2. Lungs: between an inner and an outer edge that meet at the apex, above the domes of the diaphragm.
    depth = np.clip((y - c["lung_top"]) / (c["lung_bottom"] - c["lung_top"]), 0, 1)
    opening = np.sqrt(1 - (1 - depth) ** 3)
    middle = np.float32(0.36)
    lung_outer = middle + (c["lung_outer"] * c["body_width"] - middle) * opening
    lung_inner = middle - (middle - c["lung_inner"]) * opening
    dome = c["lung_bottom"] + p["breath"] + 1.1 * (across - 0.38) ** 2 - c["right_dome"] * (side < 0)
    lung = _ramp(across - lung_inner, 0.06) * _ramp(lung_outer - across, 0.06) * _ramp(dome - y, 0.05)
    # 3. Heart, which hides part of the lung, and the vessels of the hila.
    radius = ((x - c["heart_x"]) / c["heart_size"]) ** 2 + ((y - 0.30) / (0.85 * c["heart_size"])) ** 2
    heart = _ramp(1 - radius, 0.35) * _ramp(dome + 0.04 - y, 0.08)
    hilum = np.exp(-(((across - 0.2) / 0.09) ** 2)) * (c["hilum"] * np.exp(-((y / 0.2) ** 2)))
    texture = _texture(chests["texture"], x=x[:, size // 2], y=y[:, :, 0])
    air = c["lung_air"] * (1 - 0.75 * heart)
    density += lung * (hilum + texture - air) + c["heart_density"] * 0.3 * heart
    # 4. Bones: vertebrae, ribs running down and outwards, collar bones.
    density += _ramp(0.085 - np.abs(x), 0.04) * (0.09 + 0.03 * np.cos(np.float32(2 * np.pi / 0.15) * y))
    phase = (y - c["rib_slope"] * across**2) / c["rib_spacing"] + c["rib_start"]
    ribs = np.clip(1.6 * np.cos(np.float32(2 * np.pi) * phase) - 0.5, 0, 1)
    cage = _ramp(lung_outer + 0.04 - across, 0.05) * (_ramp(y - c["lung_top"], 0.05) * _ramp(0.75 - y, 0.3))
    density += ribs * cage * c["rib_density"] * (0.5 + across)
    collar = np.abs(y - c["lung_top"] - 0.20 + 0.25 * across)
    density += _ramp(0.03 - collar, 0.03) * _ramp(0.68 - across, 0.05) * 0.1
    # 5. Opacities: fluid in place of air (so no denser than the air was), uneven, dim behind the heart.
    fluid = np.minimum(_clouds(chests, x=x, y=y), 1.1 * c["lung_air"])
    density += fluid * lung * (1 - 0.6 * heart) * (1 + 3 * texture)
    # 6. Exposure of this image.
    density *= p["gain"]
    density += p["exposure"]
    return density


def _clouds(chests: dict[str, _Floats], *, x: _Floats, y: _Floats) -> _Floats:
    """Density of the opacities at x (images, size, size) and y (images, size, 1), wherever the lung ends."""
    clouds = np.zeros_like(x)
    for slot in range(MAX_OPACITIES):
        ill = np.flatnonzero(chests["opacity_density"][:, slot])
        o = {name: v[ill, slot, None, None] for name, v in chests.items() if name.startswith("opacity")}
        across = (x[ill] - o["opacity_x"]) / (o["opacity_radius"] * o["opacity_stretch"])
        along = (y[ill] - o["opacity_y"]) * o["opacity_stretch"] / o["opacity_radius"]
        clouds[ill] += o["opacity_density"] * np.exp(-(across**2) - along**2)
    return clouds


def _texture(nodes: _Floats, *, x: _Floats, y: _Floats) -> _Floats:
    """Smooth random field of each patient: (images, nodes, nodes) seen at x and y (images, size)."""
    places = np.linspace(-1, 1, _TEXTURE_NODES, dtype=np.float32)
    spacing = 2 / (_TEXTURE_NODES - 1)

    def weights(positions: _Floats) -> _Floats:
        steps: _Floats = (positions[:, :, None] - places) / np.float32(0.75 * spacing)
        return np.exp(-(steps**2))

    # The tilt is left out of x: it would cost a full picture of weights and shows only at the corners.
    field = weights(y) @ nodes @ weights(x).transpose(0, 2, 1)
    return field.astype(np.float32, copy=False)


def opacity_boxes(chests: dict[str, _Floats], pose: dict[str, _Floats], size: int) -> NDArray[np.int64]:
    """Boxes around the opacities in pixels, (images, MAX_OPACITIES, 4), to where they fade to a third."""
    p = {name: values[:, None] for name, values in pose.items()}
    x = chests["opacity_x"] - p["tilt"] * chests["opacity_y"]
    half_x = chests["opacity_radius"] * chests["opacity_stretch"]
    half_y = chests["opacity_radius"] / chests["opacity_stretch"]
    y = chests["opacity_y"]
    edges = np.stack([x - half_x, y - half_y, x + half_x, y + half_y], axis=-1)
    shifts = np.stack([p["shift_x"], p["shift_y"]] * 2, axis=-1)
    pixels = (edges * p["zoom"][..., None] + shifts + 1) * (size / 2)
    pixels[..., :2], pixels[..., 2:] = np.floor(pixels[..., :2]), np.ceil(pixels[..., 2:])
    boxes: NDArray[np.int64] = np.clip(pixels, 0, size).astype(np.int64)
    boxes *= (chests["opacity_density"] > 0)[..., None]
    return boxes
