"""ZeroMQ sockets of a router: the bound socket, the link to the replicas, CURVE authentication."""
