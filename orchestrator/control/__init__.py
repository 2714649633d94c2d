"""The control plane: which gangs should run, which do, and what to do about the difference.

Pure: :mod:`.placement`, :mod:`.reconciler`, :mod:`.rollout`. :mod:`.controller` drives them, :mod:`.launch` starts and ends gangs on
hosts and Ray clusters, :mod:`.host` is the process of ``trireme up``. Nothing here is on a token's way.
"""
