"""Rehearsal: the sidecar's own policy code on modelled services, in virtual time, from a seed (docs/simulate.md)."""
