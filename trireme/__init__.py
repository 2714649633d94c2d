"""The public interface of Trireme: the clients, their results, and the errors that they raise. All other packages are internal.

A name is loaded when it is first used, so ``import trireme`` is cheap. The clients need pyzmq and msgspec only.
"""

from typing import TYPE_CHECKING

from workers import __version__

if TYPE_CHECKING:
    from orchestrator.client import AsyncCall, AsyncClient, Call, Choice, Client, ClientKeys, Piece, Reply
    from workers.protocol.errors import (
        ArtifactError,
        Cancelled,
        ConfigError,
        DeadlineExceeded,
        EngineFault,
        EnvironmentFault,
        NotFound,
        Overloaded,
        RateLimited,
        Rejected,
        ReplicaLost,
        TenantLimit,
        TooLarge,
        TooLong,
        TriremeError,
        Unauthorized,
        Unavailable,
        Unsupported,
    )
    from workers.protocol.specs import RouterAddress

__all__ = [
    "ArtifactError",
    "AsyncCall",
    "AsyncClient",
    "Call",
    "Cancelled",
    "Choice",
    "Client",
    "ClientKeys",
    "ConfigError",
    "DeadlineExceeded",
    "EngineFault",
    "EnvironmentFault",
    "NotFound",
    "Overloaded",
    "Piece",
    "RateLimited",
    "Rejected",
    "ReplicaLost",
    "Reply",
    "RouterAddress",
    "TenantLimit",
    "TooLarge",
    "TooLong",
    "TriremeError",
    "Unauthorized",
    "Unavailable",
    "Unsupported",
    "__version__",
]

#: Where the names come from, the cheapest module first.
_SOURCES = ("workers.protocol.errors", "workers.protocol.specs", "orchestrator.client")

# Type checkers must not see this function: they would then accept every name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Load a public name at its first use. Raises AttributeError for other names."""
        from importlib import import_module

        if name in __all__:
            for source in _SOURCES:
                if hasattr(module := import_module(source), name):
                    return globals().setdefault(name, getattr(module, name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
