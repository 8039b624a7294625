"""Which subspaces share information, and which of them become one."""
