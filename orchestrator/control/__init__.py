"""The control plane: it compares the gangs that should run with those that do, and acts on the difference.

Pure: :mod:`.placement`, :mod:`.reconciler`, :mod:`.rollout`. :mod:`.controller` drives them, :mod:`.launch` starts and ends gangs on
hosts and Ray clusters, :mod:`.host` is the process of ``trireme up``. No token passes through this package.
"""
