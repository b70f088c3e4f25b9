"""What both sides agree on: configuration, wire contract, tasks, models, privacy mathematics, metrics, errors."""
