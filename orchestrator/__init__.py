"""The processes around the replicas: routers, the controller and its launchers, the client, the command line.

Start reading at :mod:`orchestrator.router` (the life of a request) or :mod:`orchestrator.control` (the life of a gang).
"""
