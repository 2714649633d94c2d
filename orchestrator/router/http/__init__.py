"""The HTTP API of a router: server, middleware, server-sent events, health and metrics, and the dialects that it speaks."""
