"""The extra of the distribution that installs a package, for the error of a command whose package is missing. Imports none of them."""

from __future__ import annotations

from workers.protocol.errors import EnvironmentFault

#: Extra -> the modules that it installs. The names of the distributions are in pyproject.toml.
EXTRAS = {
    "server": (
        "httptools", "httpx", "jinja2", "numpy", "prometheus_client", "psutil", "rich", "safetensors", "starlette", "tokenizers", "typer",
        "uvicorn", "uvloop", "yaml",
    ),
    "torch": ("torch",), "tensorrt-llm": ("tensorrt_llm",), "mpich": ("mpi4py",), "ray": ("ray",), "guided": ("llguidance",),
    "gpu": ("pynvml",), "hub": ("huggingface_hub",), "otel": ("opentelemetry",), "convert": ("transformers",),
}  # fmt: skip


def missing_package(error: ModuleNotFoundError) -> EnvironmentFault | None:
    """The error of a command that needs the missing module of ``error``; None if no extra installs it."""
    package = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if package in modules:
            return EnvironmentFault(f"{package} is not installed", "this command needs it", f"pip install 'trireme-llm[{extra}]'")
    return None
