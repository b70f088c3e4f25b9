"""Words from outside: what reaches a terminal and a log."""

import doctest

import pytest

import common.errors
from common.errors import printable


def test_the_example_holds():
    assert doctest.testmod(common.errors).failed == 0


@pytest.mark.parametrize("bad", ["\x1b", "\n", "\r", "\x00", "\u202e", "\u2028", "\x9b", "\ud800", "\x7f"])
def test_what_a_terminal_would_act_on_becomes_a_question_mark(bad):
    assert printable(f"a{bad}b") == "a?b"


def test_letters_of_any_language_stay_and_the_length_is_bounded():
    assert printable("Zürich, 東京") == "Zürich, 東京"
    assert len(printable("x" * 10**6)) == 200
    assert printable("abc", most=2) == "ab"
