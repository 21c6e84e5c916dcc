"""`pillion run`: an application with a sidecar beside it."""
