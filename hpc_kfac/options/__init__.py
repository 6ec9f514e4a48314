"""What a user chooses: damping, Fisher source, schedule, step control."""
