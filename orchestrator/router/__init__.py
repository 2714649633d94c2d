"""A router process: HTTP and RPC in front, the routing core in the middle, ZeroMQ to the replicas behind.

``python -m orchestrator.router SPEC.json`` starts one. A request arrives in :mod:`.http` or :mod:`.rpc`, is checked and tokenized in
:mod:`.frontend`, queued and assigned to a replica by :mod:`.core`, and sent by :mod:`.net`; its tokens return the same way.
"""
