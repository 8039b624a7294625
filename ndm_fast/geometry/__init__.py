"""The mathematics of the method in plain torch: no backend, no file."""
