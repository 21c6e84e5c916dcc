"""SPIFFE identities, X.509 issuance and key files."""
