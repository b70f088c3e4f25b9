"""The accountants against the public table of DP-SGD costs, to the last digit that it prints."""

import math

import pytest

from common.privacy.accountant import epsilon, epsilon_prv, epsilon_rdp
from common.privacy.calibration import solve_noise_multiplier
from common.privacy.plan import PrivacyEvent

# q, sigma, steps, delta, epsilon by RDP, epsilon by PRV (Opacus 1.6.0); None: the table has no value
ROWS = [
    (0.04, 1.5, 2250, 1e-5, 7.3291, 6.7791),
    (0.04, 1.5, 2249, 1e-5, None, 6.7774),
    (150 / 60000, 1.3, 6000, 1e-5, 0.7242, 0.6501),
    (0.001, 1.0, 30000, 1e-7, 1.4155, 1.1077),
    (0.01, 4.0, 10000, 1e-5, 1.0355, 0.9569),
    (0.01, 4.0, 40000, 1e-5, 2.2097, 2.0432),
    (1 / 60, 4.0, 3840, 9e-6, 1.0829, 1.0007),
    (0.001, 0.8, 1000, 1e-6, 1.4619, 0.4778),
    (0.05, 1.5, 1000, 1e-6, 6.6678, 6.2100),
    (0.2, 3.0, 100, 1e-6, 3.6397, 3.3812),
    (0.2, 0.5, 3, 0.15594, None, 1.0115),
    (1, math.sqrt(3), 3, 0.126936, None, 1.0107),
    (0.01, 0.673793, 1, 1e-5, 2.3201, 1.0103),
    (0.001, 3.209565 / 6, 25, 1e-5, 2.8016, 1.0104),
    (1, 4.530877, 1, 1e-6, 1.0000, 0.9374),
    (1, 1.0, 1, 1e-5, 4.7285, 4.3874),
]
LAST_DIGIT = 1e-4
PRV_ERROR = 0.01
"""Opacus asks PRV for its upper bound with this error, so the claim (PLD) lies so far below it."""


@pytest.mark.parametrize(("q", "sigma", "steps", "delta", "by_rdp", "by_prv"), ROWS)
def test_every_row_of_the_table(q, sigma, steps, delta, by_rdp, by_prv):
    events = [PrivacyEvent(sampling_rate=q, noise_multiplier=sigma, steps=steps)]
    if by_rdp is not None:
        assert epsilon_rdp(events, delta=delta) == pytest.approx(by_rdp, abs=LAST_DIGIT)
    assert epsilon_prv(events, delta=delta) == pytest.approx(by_prv, abs=LAST_DIGIT)
    assert by_prv - 1.2 * PRV_ERROR <= epsilon(events, delta=delta) <= by_prv


@pytest.mark.parametrize(("steps", "by_prv"), [(2250, 1.34766), (2000, 1.2915)])
def test_the_inverse_rows_within_the_error_of_prv(steps, by_prv):
    found = solve_noise_multiplier(histories=[()], sampling_rate=0.04, steps=steps, epsilon=8, delta=1e-5)
    assert by_prv - 0.003 <= found <= by_prv


@pytest.mark.parametrize(
    ("accountant", "asked", "expected"),
    [
        ("rdp", {"epochs": 90}, 1.416),
        ("rdp", {"steps": 2000}, 1.3562),
        ("prv", {"epochs": 90}, 1.34766),
        ("prv", {"steps": 2000}, 1.2915),
        ("gdp", {"epochs": 90}, 1.32324),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_installed_opacus_is_the_one_of_the_table(accountant, asked, expected):
    from opacus.accountants.utils import get_noise_multiplier

    found = get_noise_multiplier(
        target_epsilon=8, target_delta=1e-5, sample_rate=0.04, accountant=accountant, **asked
    )
    assert found == pytest.approx(expected, abs=1e-4)


def test_rdp_by_order_of_the_installed_dp_accounting():
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    orders = [1.5, 2.5, 5, 50, 100]
    accountant = RdpAccountant(orders)
    step = dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(2.5))
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, 50))
    expected = [6.70579741e-4, 1.08548710e-3, 2.18075656e-3, 2.38460375e-2, 167.416308]
    assert accountant._rdp == pytest.approx(expected, rel=1e-5)
