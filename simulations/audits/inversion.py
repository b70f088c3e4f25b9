"""Gradient inversion: one hospital with one patient sends the update of one step; is the film in it.

The update comes out of `client.training.plain.train` and `client.training.private.train_privately` as they
are installed, for two models of the registry: `softmax`, whose first layer is linear, so that without privacy
the film stands in the update exactly, and `cnn-small`, the default. What counts as recognised is decided by
guesses that ignore the update: the mean of public films of the same scanner, or somebody else's film. The
threshold is what only one in a hundred such guesses exceeds, over films that are not attacked. Attacked are
the most unusual of a hundred films: there is most to learn about them, and a blurred chest is no success.

False alarms: the films are fixed by the seed, and without privacy nothing is random. Under privacy the
attacks return noise, or a chest near the public mean: over 8 private updates of each film and model those
that trust the clip reached a similarity of 0.51, with a mean of at most 0.38 and a standard deviation of at
most 0.09 a film, where the threshold is 0.73. That is four standard deviations; were they normal, a false
alarm would come in less than one of a thousand audits.
"""

import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import client.training.plain
import client.training.private
from client.images.phantoms import CLASSES, hospital_phantoms
from common.config import ModelSpec, TrainingConfig
from common.examples import Examples
from common.files import write_bytes_atomically
from common.models.registry import build_model, initial_parameters, load_parameters
from common.parameters import Parameters, difference
from common.preprocessing import Preprocessing
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import SecureRandomness
from common.tasks import Task, make_task
from simulations.audits.finding import Finding
from simulations.audits.reconstruction import (
    Image,
    PublicImages,
    Seen,
    linear_leak,
    match_gradients,
    most_probable,
    similarity,
)

PICTURE = "inversion.png"
SIDE = 28
LINEAR, CONVOLUTIONAL = "softmax", "cnn-small"
PLAN = PrivacyPlan(
    sampling_rate=1.0,
    l2_clip_norm=1.0,
    noise_multiplier=1.0,
    steps=1,
    enrolled_units=1,
    max_rows_per_unit=1,
    unit="patient",
)
"""An ordinary clip and noise in the case that is worst for the patient: alone, and in every step."""
TRAINING = TrainingConfig(learning_rate=0.5, batch_size=1)
RARELY = 0.99
"""Share of the guesses that stay below the threshold."""
MARGIN = 0.1
"""By how much a film must exceed the threshold to count as recovered without privacy."""
_PUBLIC, _HELD_OUT, _CANDIDATES, _ATTACKED = 600, 300, 100, 4
_REFINED = 150
"""Iterations of the attack with a prior, which needs fewer."""


@dataclass(frozen=True, kw_only=True)
class Films:
    """Phantoms of one scanner, float64 (rows, SIDE, SIDE), one film of each patient."""

    public: Image
    """What the attacker has seen of other patients."""
    held_out: Image
    """What the threshold is measured on."""
    attacked: Image
    labels: tuple[int, ...]
    """Class of each attacked film."""


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """One film and what became of it."""

    film: Image
    guess: Image
    """The better one of the public mean and another patient's film."""
    exact: Image
    """Without privacy, from the linear first layer of `softmax`."""
    matched: Image
    """Without privacy, from `cnn-small` by matching gradients."""
    private: Image
    """Under privacy: of all attacks on both models the one that came closest."""


def audit_inversion(*, folder: Path, quick: bool = False, seed: int = 0) -> Finding:
    """Reconstruct films from updates with and without privacy; writes a picture to `folder`.

    It passes when every film is recovered without privacy (else the audit could see nothing) and none is
    recognised under it, even if the attacker were told which of the attacks came closest.
    """
    started = time.monotonic()
    films = _films(seed)
    public = PublicImages.of(films.public)
    threshold = float(
        np.quantile([_guess(film, films.public, row)[1] for row, film in enumerate(films.held_out)], RARELY)
    )
    cases = [_attack(films, public, number, quick=quick) for number in range(2 if quick else _ATTACKED)]
    exact = min(similarity(case.exact, case.film) for case in cases)
    matched = min(similarity(case.matched, case.film) for case in cases)
    private = max(similarity(case.private, case.film) for case in cases)
    gain = max(similarity(case.private, case.film) - similarity(case.guess, case.film) for case in cases)
    recovered, hidden = min(exact, matched) >= threshold + MARGIN, private <= threshold
    write_bytes_atomically(folder / PICTURE, _picture(cases, threshold))
    return Finding(
        audit="gradient-inversion",
        passed=recovered and hidden,
        said=f"From one step on one film, {len(cases)} of them in turn: without privacy the films come back "
        f"with similarity {exact:.2f} ({LINEAR}) and {matched:.2f} ({CONVOLUTIONAL}) or more; under noise "
        f"multiplier {PLAN.noise_multiplier:g} with at most {private:.2f}. A guess that ignores the update "
        f"exceeds {threshold:.2f} for one film in a hundred.",
        numbers={
            "threshold": threshold,
            "similarity without privacy, linear leak": exact,
            "similarity without privacy, gradients matched": matched,
            "similarity under privacy, best attack": private,
            "largest gain of the best attack over the guess": gain,
            "noise multiplier": PLAN.noise_multiplier,
            "films": float(len(cases)),
        },
        black_box=True,
        wall_s=time.monotonic() - started,
        pictures=(PICTURE,),
    )


def _films(seed: int) -> Films:
    drawn = hospital_phantoms(
        hospital=0, num_patients=_PUBLIC + _HELD_OUT + _CANDIDATES, image_size=SIDE, seed=seed
    )
    first = np.unique(np.asarray(drawn.patients), return_index=True)[1]
    public, held_out, candidates = np.split(drawn.images[first] / 255, [_PUBLIC, _PUBLIC + _HELD_OUT])
    labels = drawn.labels[first][-_CANDIDATES:]
    usual = [_guess(film, public, row)[1] for row, film in enumerate(candidates)]
    unusual = np.argsort(usual)[:_ATTACKED]
    return Films(
        public=public,
        held_out=held_out,
        attacked=candidates[unusual],
        labels=tuple(int(label) for label in labels[unusual]),
    )


def _guess(film: Image, public: Image, number: int) -> tuple[Image, float]:
    """Return the better one of two guesses at `film` that ignore the update, and its similarity."""
    guesses = (public.mean(axis=0), public[number % len(public)])
    scored = [(guess, similarity(guess, film)) for guess in guesses]
    return max(scored, key=lambda pair: pair[1])


def _attack(films: Films, public: PublicImages, number: int, *, quick: bool) -> Attacked:
    film, label = films.attacked[number], films.labels[number]
    iterations, restarts = (250, 1) if quick else (400, 2)

    def matched(seen: Seen) -> Image:
        return match_gradients(seen, side=SIDE, iterations=iterations, restarts=restarts, seed=number)

    linear, convolutional = (observe(name, film, label, private=True) for name in (LINEAR, CONVOLUTIONAL))
    attempts = [
        linear_leak(linear, side=SIDE),
        matched(convolutional),
        most_probable(linear, public, iterations=_REFINED),
        most_probable(convolutional, public, iterations=_REFINED),
    ]
    return Attacked(
        film=film,
        guess=_guess(film, films.public, number)[0],
        exact=linear_leak(observe(LINEAR, film, label, private=False), side=SIDE),
        matched=matched(observe(CONVOLUTIONAL, film, label, private=False)),
        private=max(attempts, key=lambda attempt: similarity(attempt, film)),
    )


def observe(name: str, film: Image, label: int, *, private: bool) -> Seen:
    """Train one step on `film` in the production path and look at nothing but the update."""
    spec = ModelSpec(name=name, channels=1, image_size=SIDE, num_outputs=len(CLASSES))
    task = make_task("classification", CLASSES)
    weights = initial_parameters(spec, seed=0)
    update = outgoing_update(spec, task, weights, film, label, private=private)
    model = build_model(spec)
    load_parameters(model, weights)
    return Seen(
        model=model,
        task=task,
        gradient=tuple(torch.from_numpy(-array / TRAINING.learning_rate) for array in update.values()),
        l2_clip_norm=PLAN.l2_clip_norm if private else None,
        noise_stddev=PLAN.noise_stddev if private else 0.0,
    )


def outgoing_update(
    spec: ModelSpec, task: Task, weights: Parameters, film: Image, label: int, *, private: bool
) -> Parameters:
    """Update that a hospital sends after one step on one film of one patient."""
    model = build_model(spec)
    load_parameters(model, weights)
    patient = Examples(
        inputs={"image": np.rint(film * 255).astype(np.uint8)[None, None]},
        targets=np.array([label]),
        units=np.array([0]),
        unit_ids=("phantom",),
    )
    preprocessing = Preprocessing(image_size=spec.image_size, channels=spec.channels)
    device = torch.device("cpu")
    if private:
        result = client.training.private.train_privately(
            model=model, task=task, examples=patient, preprocessing=preprocessing, plan=PLAN,
            training=TRAINING, round_number=1, num_rounds=1, randomness=SecureRandomness(), device=device,
        )  # fmt: skip
    else:
        result = client.training.plain.train(
            model=model, task=task, examples=patient, preprocessing=preprocessing, local_steps=1,
            training=TRAINING, round_number=1, num_rounds=1, randomness=SecureRandomness(), device=device,
        )  # fmt: skip
    return difference(result.parameters, weights)


def _picture(cases: list[Attacked], threshold: float) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = {
        "film": "the patient's film",
        "exact": f"no privacy,\n{LINEAR}",
        "matched": f"no privacy,\n{CONVOLUTIONAL}",
        "private": f"noise multiplier {PLAN.noise_multiplier:g},\nbest attack",
        "guess": "guess without\nthe update",
    }
    figure = Figure(figsize=(2.0 * len(columns), 2.15 * len(cases) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(cases), len(columns), squeeze=False)
    for row, case in enumerate(cases):
        for column, (name, title) in enumerate(columns.items()):
            axes, image = grid[row, column], getattr(case, name)
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(title, fontsize=10)
            if name != "film":
                axes.set_xlabel(f"similarity {similarity(image, case.film):.2f}", fontsize=9)
    figure.suptitle(f"One film from the update of one step (recognised above {threshold:.2f})", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
