"""Launchers: how a gang of MPI ranks is started, watched and killed, on this host or on a Ray cluster.

:mod:`.launcher` is the seam, :mod:`.local_launcher` and :mod:`.ray_launcher` are its members, :mod:`.supervisor` is the one mpiexec of a
gang and everything below it.
"""
