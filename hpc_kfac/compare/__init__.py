"""Methods side by side: `hpc-kfac bench`. Nothing else of the package imports it."""
