"""JSON files of model folders, read like Python's json does: Python wrote them, so they may contain NaN and Infinity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import msgspec

from workers.artifacts.git_lfs import refuse_pointer
from workers.artifacts.safetensors_file import COPY_AGAIN, regular
from workers.protocol.errors import ArtifactError, ConfigError

T = TypeVar("T")


def decode(path: Path, kind: type[T]) -> T:
    """A JSON file as ``kind``. Raises :class:`ArtifactError` naming the file."""
    try:
        data = regular(path).read_bytes()
        refuse_pointer(path, data)
        return msgspec.convert(json.loads(data), kind)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read", error.strerror or str(error), COPY_AGAIN) from error
    except RecursionError as error:
        raise ArtifactError(f"{path} does not make sense", "its values are nested too deeply", COPY_AGAIN) from error
    except (ValueError, msgspec.MsgspecError) as error:
        raise ArtifactError(f"{path} does not make sense", str(error), COPY_AGAIN) from error
    except ConfigError as error:
        raise ArtifactError(f"{path}: {error.what}", error.why, error.hint or COPY_AGAIN) from error
