"""A generator behind HTTP: requests checked, batched, counted and answered."""
