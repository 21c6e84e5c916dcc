"""pillion's control plane and its command line."""
