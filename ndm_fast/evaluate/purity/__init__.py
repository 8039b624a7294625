"""What the nearest neighbors inside each subspace have in common."""
