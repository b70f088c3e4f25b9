"""A trained model asked about new images: reading it, abstaining, answering, heat maps and pages."""
