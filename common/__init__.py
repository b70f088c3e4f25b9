"""What both sides agree on: configuration, wire, tasks, models, privacy mathematics, metrics, errors."""
