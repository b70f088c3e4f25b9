"""The operator's side: ServerApp, round, checks, aggregation, checkpoints and the command `flower-server`."""
