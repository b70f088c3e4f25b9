"""Privacy mathematics: the plan, the accountant, sampling and the sources of randomness."""
