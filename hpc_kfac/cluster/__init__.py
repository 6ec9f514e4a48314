"""The machine: environment, ranks, errors, schedulers, leases, files."""
