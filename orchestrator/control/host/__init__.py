"""The process of ``trireme up``: it hosts one deployment, from its lock file to the check that no process of it is left.

Owns the deployment's routers, its control socket and status table, and hands the wanted replicas to the controller.
"""
