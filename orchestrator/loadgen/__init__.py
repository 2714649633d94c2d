"""A load generator for OpenAI endpoints and for the RPC door: what `trireme bench` runs."""
