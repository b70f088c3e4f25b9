"""How much a hospital's update weighs in the mean: a public function of its enrolled count alone.

Under privacy with one step in each round the update of hospital k is minus l times (its patients' clipped
sum + noise of standard deviation sigma_k C) / (q n_k). Where its patients' gradients have the mean g, that is
g plus noise of variance (sigma_k C / (q n_k))^2. Weights n_k (`patients`, FedAvg) treat every patient alike
and add the noise of all hospitals with the same weight: however small a hospital is, it adds as much as any.
Weights n_k^2 (`squares`) are inverse to the noise's variance, and of all weights make that of the mean least
for a g that is the same everywhere (Gauss-Markov; all sigma_k about the same). Example: hospitals of 1800 and
40 patients. Standard deviation of the noise in the mean, in units of the large one's alone: 1.38 with
`patients`, 0.9998 with `squares`.

The price: patients of large hospitals count for more, so where hospitals differ the model leans to the large.
Privacy is the same: the mean is computed from what the hospitals have let out.
"""

from common.config import ServerSection


def weight_of(server: ServerSection, *, enrolled_patients: int) -> int:
    """The weight of an update, of any scale."""
    return enrolled_patients**2 if server.weighting == "squares" else enrolled_patients
