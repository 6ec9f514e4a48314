"""Tables and pictures out of run folders: `hpc-kfac report`."""
