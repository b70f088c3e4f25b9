"""Questions to the server in a thread of their own, one at a time: a slow network holds nothing up."""

import queue
import threading
from contextlib import suppress

from cryptography.hazmat.primitives.asymmetric import ec

from client.connection import ask_server
from client.deployment.open_session import end_session
from client.server_answer import Answer, ServerState
from common.enrolment import Enrolment
from common.errors import FederationError


class Questions:
    """Asks whether the server knows this hospital and takes it for connected."""

    def __init__(self, enrolment: Enrolment, key: ec.EllipticCurvePrivateKey, *, https_proxy: str) -> None:
        self._enrolment, self._key, self._proxy = enrolment, key, https_proxy
        self._answers: queue.Queue[tuple[int, Answer]] = queue.Queue()
        self._number = 0
        self._thread: threading.Thread | None = None

    @property
    def is_asking(self) -> bool:
        """Whether a question is under way."""
        return self._thread is not None and self._thread.is_alive()

    def ask(self, *, end_first: int | None = None) -> None:
        """Ask unless a question is under way; `end_first` is the node whose dead session is ended before."""
        if not self.is_asking:
            self._number += 1
            arguments = (self._number, end_first)
            self._thread = threading.Thread(target=self._ask, args=arguments, daemon=True)
            self._thread.start()

    def answer(self) -> Answer | None:
        """The answer to the last question, once."""
        with suppress(queue.Empty):
            number, answer = self._answers.get_nowait()
            return answer if number == self._number else None
        return None

    def forget(self) -> None:
        """What is under way was asked about a session that is gone."""
        self._number += 1

    def _ask(self, number: int, end_first: int | None) -> None:
        try:
            if end_first is not None and not self._proxy:
                end_session(self._enrolment, self._key, end_first)
            answer = ask_server(self._enrolment, self._key, https_proxy=self._proxy)
        except FederationError as error:
            answer = Answer(state=ServerState.OTHER, what=error.what, why=error.why, fix=error.fix)
        except Exception as error:  # a thread that ends in silence would stop all questions
            answer = Answer(state=ServerState.OTHER, what=f"asking the server failed: {type(error).__name__}")
        self._answers.put((number, answer))
