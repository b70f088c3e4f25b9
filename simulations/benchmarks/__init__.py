"""What `flower-simulate bench` measures, one file per subject."""
