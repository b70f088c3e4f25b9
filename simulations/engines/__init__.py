"""Engines: ways to run one ServerApp and many ClientApps on this machine."""
