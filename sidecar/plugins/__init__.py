"""The built-in filters, each written against `sidecar.api` alone, and the loader that finds them and others."""
