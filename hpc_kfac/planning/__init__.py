"""What a run will take on a machine that is not at hand: machine models, and a simulation of the engine's own plans."""
