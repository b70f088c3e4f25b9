"""A request that the front answers by itself, with a status that the caller understands."""


class Refused(Exception):  # noqa: N818 - an answer, not an error
    """The status and the words of the answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text
