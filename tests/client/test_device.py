"""Kernels that give the same bits, for as long as they are asked for."""

import pytest
import torch

from client.device import reproducible_kernels


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def state():
    return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()


def test_one_thread_and_deterministic_kernels_while_wanted(two_threads):
    with reproducible_kernels(True):
        assert state() == (1, True)
    assert state() == (2, False)


def test_nothing_changes_otherwise(two_threads):
    with reproducible_kernels(False):
        assert state() == (2, False)


def test_what_was_comes_back_after_an_error(two_threads):
    with pytest.raises(KeyError), reproducible_kernels(True):
        raise KeyError
    assert state() == (2, False)
