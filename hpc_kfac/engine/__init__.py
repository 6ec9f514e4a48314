"""One step: the plan, and what executes it."""
