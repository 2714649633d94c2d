"""The ``trireme`` command: the file ``X.py`` holds the command ``trireme X``. What several commands share is named after what it holds.

This package and the ``__main__`` modules read the environment; nothing else does but :mod:`orchestrator.config.deployment_file`.
"""
