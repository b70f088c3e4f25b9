"""Why a picture cannot be brought to what a model was trained on."""

from enum import StrEnum


class Problem(StrEnum):
    """One for each step that can fail; the values are those of the reasons that a hospital reads."""

    NO_UNITS = "other-units"
    GREY = "grey-for-colour"
    COLOURED = "coloured-for-grey"
    NO_FOREGROUND = "no-foreground"
    TOO_SMALL = "too-small-for-crop"


class CannotPrepareError(ValueError):
    """A picture that the configured steps cannot be applied to."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.value)
        self.problem = problem
