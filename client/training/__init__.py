"""Training in a hospital: patient by patient under differential privacy, or plainly with its consent."""
