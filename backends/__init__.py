"""Backends: ways to run programs on targets. Each is found by its entry point, never imported by the core."""
