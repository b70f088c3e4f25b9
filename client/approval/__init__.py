"""Plans and updates that a person has to approve."""
