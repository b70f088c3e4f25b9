"""The configured steps from a picture to the model's array, each fixed arithmetic on the one picture."""
