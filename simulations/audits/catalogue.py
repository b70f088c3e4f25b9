"""All audits by name, with the sizes that the command runs them at. Heavy imports wait until one runs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from simulations.audits.finding import Finding


@dataclass(frozen=True, kw_only=True)
class Audit:
    """One audit as the command runs it."""

    name: str
    """For `--only`; several may share one."""
    title: str
    tries: str
    """What is tried, in a sentence."""
    run: Callable[[Path, bool], Finding]
    """Folder for pictures, and whether it must be quick."""


def _neighbours(folder: Path, quick: bool) -> Finding:
    from common.models.names import MODELS
    from simulations.audits.neighbours import audit_neighbours

    if quick:
        return audit_neighbours(models=("softmax", "cnn-small", "lstm"), clips=(0.05,), chunks=(3, 256))
    shallow = [name for name, known in MODELS.items() if not known.deep]
    return audit_neighbours(models=shallow)


def _neighbours_of_resnet(folder: Path, quick: bool) -> Finding:
    from simulations.audits.neighbours import audit_neighbours

    kinds = ("scaled", "nan") if quick else ("scaled", "nan", "rare class", "many images", "alone")
    chunks = (256,) if quick else (1, 256)
    lengths = (1, 3, 2)
    return audit_neighbours(
        models=("resnet18",), kinds=kinds, clips=(0.05,), chunks=chunks, size=16, lengths=lengths
    )


def _neighbours_black_box(folder: Path, quick: bool) -> Finding:
    from simulations.audits.neighbours import audit_neighbours_black_box

    return audit_neighbours_black_box()


def _noise(folder: Path, quick: bool) -> Finding:
    from simulations.audits.noise import audit_noise

    return audit_noise(steps=2 if quick else 4)


def _noise_black_box(folder: Path, quick: bool) -> Finding:
    from simulations.audits.noise import audit_noise_black_box

    return audit_noise_black_box(rounds=4 if quick else 12)


def _sampling(folder: Path, quick: bool) -> Finding:
    from simulations.audits.sampling import audit_sampling

    return audit_sampling(steps=1000, rounds=300) if quick else audit_sampling()


def _sampling_black_box(folder: Path, quick: bool) -> Finding:
    from simulations.audits.sampling import audit_sampling_black_box

    return audit_sampling_black_box(rounds=500, long_rounds=60) if quick else audit_sampling_black_box()


def _accounting(folder: Path, quick: bool) -> Finding:
    from simulations.audits.accounting import audit_accounting

    return audit_accounting(rounds=4 if quick else 10)


def _accounting_of_counts(folder: Path, quick: bool) -> Finding:
    from simulations.audits.accounting import audit_charged_counts

    return audit_charged_counts(evaluations=6 if quick else 20)


def _canary(sampled: bool, black_box: bool) -> Callable[[Path, bool], Finding]:
    def run(folder: Path, quick: bool) -> Finding:
        from simulations.audits.canary import FULL_BATCH, SAMPLED, audit_canary

        runs = 500 if quick else 1500 if black_box else 2500
        return audit_canary(SAMPLED if sampled else FULL_BATCH, runs=runs, black_box=black_box)

    return run


def _one_run(folder: Path, quick: bool) -> Finding:
    from simulations.audits.one_run import audit_one_run

    return audit_one_run()


def _membership(folder: Path, quick: bool) -> Finding:
    from simulations.audits.membership import audit_membership

    return audit_membership(folder=folder, quick=quick)


def _inversion(folder: Path, quick: bool) -> Finding:
    from simulations.audits.inversion import audit_inversion

    return audit_inversion(folder=folder, quick=quick)


def _slow_training(folder: Path, quick: bool) -> Finding:
    from simulations.audits.arithmetic import audit_slow_training

    return audit_slow_training()


def _interrupted_round(folder: Path, quick: bool) -> Finding:
    from simulations.audits.arithmetic import audit_interrupted_round

    return audit_interrupted_round()


def _grid(folder: Path, quick: bool) -> Finding:
    from simulations.audits.arithmetic import audit_grid_black_box

    return audit_grid_black_box()


def _repeated_noise(folder: Path, quick: bool) -> Finding:
    from simulations.audits.repeated_rounds import audit_repeated_noise

    return audit_repeated_noise()


def _repeated_draws(folder: Path, quick: bool) -> Finding:
    from simulations.audits.repeated_rounds import audit_repeated_draws

    return audit_repeated_draws()


_MOVED = "One patient more or less (scaled, not finite, doubled, with many images ...)"
_STEPS = "Two worlds, with and without one patient whose gradient nobody else touches"

AUDITS = (
    Audit(
        name="neighbours",
        title="Neighbours",
        tries=f"{_MOVED}: how far does the sum move that is noised?",
        run=_neighbours,
    ),
    Audit(
        name="neighbours",
        title="Neighbours, ResNet-18",
        tries=f"{_MOVED}, in a deep network.",
        run=_neighbours_of_resnet,
    ),
    Audit(
        name="neighbours",
        title="Neighbours, from the update",
        tries=f"{_MOVED}: how far does the update move, with hardly any noise?",
        run=_neighbours_black_box,
    ),
    Audit(
        name="arithmetic",
        title="Slow training",
        tries="Is an update, but for its noise, that of DP-SGD done one patient at a time?",
        run=_slow_training,
    ),
    Audit(
        name="arithmetic",
        title="Interrupted round",
        tries="Does a round that broke off leave anything of its patients to the next one?",
        run=_interrupted_round,
    ),
    Audit(
        name="arithmetic",
        title="Grid",
        tries="Do the numbers that leave lie on the public grid, so that their last bits tell nothing?",
        run=_grid,
    ),
    Audit(
        name="noise",
        title="Noise",
        tries="Is the noise of every step as large as stated, in every weight, and fresh?",
        run=_noise,
    ),
    Audit(
        name="noise",
        title="Noise, from the update",
        tries="Do updates of hospitals that are seeded alike hold the stated noise, and never the same?",
        run=_noise_black_box,
    ),
    Audit(
        name="noise",
        title="Noise of repeated rounds",
        tries="Does each weight differ by the charged noise when a round is asked for again?",
        run=_repeated_noise,
    ),
    Audit(
        name="sampling",
        title="Draws of repeated rounds",
        tries="Do hospitals that are seeded alike draw other patients in the same rounds?",
        run=_repeated_draws,
    ),
    Audit(
        name="sampling",
        title="Sampling",
        tries="Does every patient enter each step on their own with the accounted probability?",
        run=_sampling,
    ),
    Audit(
        name="sampling",
        title="Sampling, from the update",
        tries="The same, read from updates with hardly any noise.",
        run=_sampling_black_box,
    ),
    Audit(
        name="accounting",
        title="Accounting of updates",
        tries="Does a hospital's ledger charge what its updates hold, and claim what that costs?",
        run=_accounting,
    ),
    Audit(
        name="accounting",
        title="Accounting of counts",
        tries="Are counts about validation patients noised as charged, and charged each time?",
        run=_accounting_of_counts,
    ),
    Audit(
        name="canary",
        title="Canary, full batches",
        tries=f"{_STEPS}; the attacker sees every step.",
        run=_canary(False, False),
    ),
    Audit(
        name="canary",
        title="Canary, sampled steps",
        tries=f"{_STEPS}; the attacker sees every step, which the patient enters by chance.",
        run=_canary(True, False),
    ),
    Audit(
        name="canary",
        title="Update canary, full",
        tries=f"{_STEPS}; the attacker sees the update of a round.",
        run=_canary(False, True),
    ),
    Audit(
        name="canary",
        title="Update canary, sampled",
        tries=f"{_STEPS}; the attacker sees the update of a round, whose steps the patient enters by chance.",
        run=_canary(True, True),
    ),
    Audit(
        name="one-run",
        title="One run",
        tries="8,100 patients of our own, each in by the toss of a coin: who was in, going by one update?",
        run=_one_run,
    ),
    Audit(
        name="membership",
        title="Membership inference",
        tries="Likelihood-ratio attack (LiRA) on a deliberately overfitted model, with and without privacy.",
        run=_membership,
    ),
    Audit(
        name="inversion",
        title="Gradient inversion",
        tries="Can one film be drawn from the update of one step, with and without privacy?",
        run=_inversion,
    ),
)
