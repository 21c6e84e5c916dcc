"""Frozen types that every other package speaks in, and the policy file's strict parser."""
