"""Models and data whose true subspaces are known."""
