"""Image classifiers by name, valid under differential privacy."""
