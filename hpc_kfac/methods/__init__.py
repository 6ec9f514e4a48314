"""Curvature methods: stateless functions plus a table of the state they need."""
