"""Which subspace writes to which: by weights, by path patching, by gradients."""
