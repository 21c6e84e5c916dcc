"""A small mesh on this machine, with a story that really happens (`pillion demo`)."""
