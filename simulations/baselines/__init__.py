"""Classical classifiers on simple features, for the comparison table; nothing of them leaves this machine."""
