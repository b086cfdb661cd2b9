"""Training: the one loop, populations in lockstep, one run and its rounds, and studies (``experiment.run_all``)."""
