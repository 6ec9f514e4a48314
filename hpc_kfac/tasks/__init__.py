"""Models, losses and tasks by name."""
