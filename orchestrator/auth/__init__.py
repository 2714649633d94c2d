"""Secrets and access: CURVE key pairs, API keys, the prefix-cache salt, and who may do what with them.

Owns key files (mode 0600) and the access lists made from them. Used by routers, the host process and the command line.
"""
