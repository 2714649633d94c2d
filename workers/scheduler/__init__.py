"""Continuous batching: requests become sequences, sequences become step plans, step results become tokens. Pure; the leader owns it."""
