"""`python -m tests.bench.control`: a real control plane, and a swarm of simulated sidecars around it."""
