"""A running control plane: the edge between the store, the sidecars and the operators."""
