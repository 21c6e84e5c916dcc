"""pillion's data plane: the sidecar that carries one service's traffic."""
