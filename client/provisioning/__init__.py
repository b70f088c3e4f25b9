"""What a hospital sets up and keeps in order: key, configuration, accepted code, pause, checks."""
