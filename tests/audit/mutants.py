"""Bugs put back into the production code at run time, one at a time: the audit of the audits.

Each mutant is a function that patches production modules (never an audit) so that training, accounting or
release really behaves as its docstring says. Where a guard of ours refuses the bug, the mutant takes the
guard out first. Names of traps: T1 to T12, of Opacus and of loaders (`client/training/guard.py` lists them);
"amplification", claims of privacy that do not hold; "handling", how noise, budget and numbers are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

Patching = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One bug."""

    name: str
    trap: str
    says: str
    """What the code does then, in a sentence."""
    put_in: Patching
    caught_by: str
    """The check that is tried first."""


MUTANTS: dict[str, Mutant] = {}


def mutant(trap: str, *, caught_by: str) -> Callable[[Patching], Patching]:
    """Register a mutant; its name and sentence are those of the function."""

    def register(put_in: Patching) -> Patching:
        name = put_in.__name__.replace("_", "-")
        assert name not in MUTANTS
        says = " ".join((put_in.__doc__ or "").split()).rstrip(".")
        MUTANTS[name] = Mutant(name=name, trap=trap, says=says, put_in=put_in, caught_by=caught_by)
        return put_in

    return register


def all_mutants() -> dict[str, Mutant]:
    """Every mutant by name, the files of mutants loaded."""
    from tests.audit import (  # noqa: F401
        mutants_of_noise,
        mutants_of_office,
        mutants_of_rows,
        mutants_of_sampling,
        mutants_of_training,
    )

    return MUTANTS


def nothing(*_: object, **__: object) -> None:
    """Stand in for a guard that is taken out."""
