"""The process of ``trireme up``: it holds one deployment from its lock file to the proof that nothing of it is left.

Owns the deployment's routers, its control socket and status table, and hands the wanted replicas to the controller.
"""
