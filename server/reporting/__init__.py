"""What people and scripts read of a run: the run folder as a record, report, plots, model card, overview."""
