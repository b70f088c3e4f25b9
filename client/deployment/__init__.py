"""A hospital in operation: Flower's SuperNode, our worker, and the supervisor of both."""
