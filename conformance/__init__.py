"""Test vectors for any implementation of SafeDPO (docs/conformance.md)."""
