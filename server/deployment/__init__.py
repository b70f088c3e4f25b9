"""The running server: SuperLink kept on loopback, our front before it, the run followed to its end."""
