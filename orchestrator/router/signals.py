"""The signal that a host process sends to its routers. Both sides import it from here."""

from __future__ import annotations

import signal

#: Ends a router as SIGTERM does. Only the host process sends it, so a router never takes it for an order from outside, and never takes an
#: order from outside for the host's second one.
STOP = signal.SIGUSR1
