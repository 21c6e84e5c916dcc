"""What a control plane knows, rebuilt from one revision of the store by pure functions."""
