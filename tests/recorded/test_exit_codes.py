"""Wrong command lines: the exit code of each, and what it says. ``<folder>`` stands for the folder in which it was run.

Record again: ``python -m tests.recorded.record exit_codes``.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from pathlib import Path

import pytest

from tests.recorded import lines
from tests.recorded.recording import as_text, check, check_names

AREA = "exit_codes"
MODEL = "models:\n  - name: tiny\n    engine: fake\n"
FILES = {
    "good.yaml": "name: small\n" + MODEL,
    "local.yaml": "name: small\nlauncher: local\n" + MODEL,
    "gpu.yaml": "models:\n  - name: smollm2-135m-instruct\n    device: cuda\n    dtype: bf16\n",
    "key.yaml": MODEL.replace("engine", "engin"),
    "port.yaml": MODEL + "http:\n  port: 70000\n",
    "metrics.yaml": MODEL + "metrics:\n  port: -1\n",
    "type.yaml": MODEL + "    tp_size: many\n",
    "twice.yaml": MODEL + "  - name: tiny\n    engine: fake\n",
    "open.yaml": MODEL + "http:\n  host: 0.0.0.0\n",
    "name.yaml": "name: UPPER\n" + MODEL,
    "nothing.yaml": "name: small\n",
    "broken.yaml": "models: [1\n",
    "list.yaml": "- 1\n",
}
#: Lines as they are typed, by what is wrong with them.
LINES = {
    "unknown command": "doctr",
    "no command of a group": "keys",
    "missing argument": "serve",
    "unknown flag": "serve tiny --no-such-flag",
    "number below its bound": "serve tiny --replicas 0",
    "number that is none": "serve tiny --port many",
    "unknown number format": "serve tiny --dtype int3",
    "unknown quantization": "serve tiny --quant int2",
    "unknown log format": "--log-format xml version",
    "port out of range": "doctor --port 0",
    "deployment file missing": "up missing.yaml",
    "unknown key in a file": "up key.yaml",
    "port out of range in a file": "config show port.yaml",
    "metrics port out of range in a file": "config show metrics.yaml",
    "wrong type in a file": "config show type.yaml",
    "a model named twice": "config show twice.yaml",
    "open to the network without keys": "config show open.yaml",
    "bad deployment name": "config show name.yaml",
    "no models": "config show nothing.yaml",
    "no YAML": "config show broken.yaml",
    "a list for a file": "config show list.yaml",
    "standing router without an address": "router good.yaml",
    "unknown model": "pull no-such-model",
    "no model in the folder": "inspect /no/such/folder",
    "conversion of nothing": "convert /no/such/folder -o out",
    "nobody answers": "chat hello --url http://127.0.0.1:9",
    "empty prompt": "generate ''",
    "no deployment runs": "status",
    "no such deployment": "status nobody",
    "unknown form of status": "status -o xml",
    "drain without a deployment": "drain tiny-0",
    "down without a deployment": "down nobody",
    "update without a deployment": "update good.yaml",
    "no logs": "logs --run-dir none",
    "logs since a bad time": "logs --since soon",
    "no keys": "keys show --name nobody",
    "revoke nobody": "keys api revoke nobody",
    "unknown engine folder": "engines show nobody",
    "nothing to plan": "plan good.yaml",
    "unknown GPU": "plan gpu.yaml --gpus 8xB999",
    "unknown form of bench": "bench --output xml",
    "several nodes without Ray": "submit slurm local.yaml --nodes 2 --dry-run",
    "an error as JSON": "pull no-such-model --log-format json",
}


def recordings() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for file, text in FILES.items():
            (folder / file).write_text(text)
        ran = lines.run([shlex.split(line) for line in LINES.values()], folder)
    blocks = []
    for (what, line), one in zip(LINES.items(), ran, strict=True):
        assert "Traceback" not in one.err, one.err
        block = f"# {what}\n$ trireme {line}\nexit code {one.code}\n"
        block += "".join(
            f"{stream}| {row.rstrip()}\n" for stream, text in (("out", one.out), ("err", one.err)) for row in text.splitlines()
        )
        block = block.replace(str(folder), "<folder>")
        blocks.append(re.sub(r'"time": [0-9.]+', '"time": <time>', block))
    return {"lines.txt": as_text("\n".join(blocks))}


@pytest.fixture(scope="module")
def now() -> dict[str, str]:
    return recordings()


def test_wrong_lines_end_as_recorded(now: dict[str, str]) -> None:
    check_names(AREA, now)
    check(AREA, "lines.txt", now["lines.txt"])
