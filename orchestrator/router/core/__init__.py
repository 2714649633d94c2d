"""The routing core: a pure state machine of requests, replicas and queues. Time is an argument; it reads no clock and no socket.

Events go in (a request, a replica's message, a tick), actions come out (send this, deliver that). :mod:`.router_core` is the entry.
"""
