"""The data doctor: what is wrong, or odd, about a hospital's images; local, nothing of it is ever sent."""
