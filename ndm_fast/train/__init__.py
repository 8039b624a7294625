"""The algorithm: from activations to a rotation and a partition; knows no model and no path."""
