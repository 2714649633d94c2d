"""A router process: HTTP and RPC in front, the routing core in the middle, ZeroMQ to the replicas behind.

``python -m orchestrator.router SPEC.json`` starts one. A request comes in through :mod:`.http` or :mod:`.rpc`, is checked and tokenized in
:mod:`.frontend`, queued and given to a replica by :mod:`.core`, and sent by :mod:`.net`; its tokens take the same way back.
"""
