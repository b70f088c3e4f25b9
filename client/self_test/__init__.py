"""Is differential privacy really on? Tried before the first round of a run."""
