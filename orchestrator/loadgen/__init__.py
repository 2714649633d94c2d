"""A load generator for OpenAI endpoints and for RPC servers: what `trireme bench` runs."""
