"""`hpc-kfac submit` and `hpc-kfac status`."""
