"""One training loop for every stage, checkpoints that resume exactly, and what is seen while it runs."""
