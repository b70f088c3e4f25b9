"""Privacy audits: attacks on our own training path, and what they found."""
