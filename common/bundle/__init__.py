"""The app bundle that the server submits to Flower: a name and a version, no code."""
