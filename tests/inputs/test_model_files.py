"""Model folders that would run code, wait for ever or lead elsewhere: refused by name before anything of them is used."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.main import run
from orchestrator.router.frontend.chat_template import TemplateFile, TemplateSource
from orchestrator.router.frontend.sandbox_pool import SandboxPool
from orchestrator.router.frontend.sandbox_worker import RenderJob
from orchestrator.router.frontend.tokenizer import load
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from workers.artifacts.artifact import open_artifact
from workers.protocol.errors import ArtifactError, Rejected


class Bomb:
    """Whoever unpickles this makes a folder."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self._canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


# --- S10: code that comes with a model


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.pkl", "rank0.bin"])
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_pickled_weights_are_never_opened(
    tmp_path: Path, canary: Path, name: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Bomb(canary)))
    assert run([command, str(model), *(["-o", str(tmp_path / "out")] if command == "convert" else [])]) == ArtifactError.exit_code
    said = capsys.readouterr().err
    assert str(model) in said and "Traceback" not in said
    assert not canary.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pickle_by_another_name_is_damage(tmp_path: Path, canary: Path, place: str) -> None:
    model = tiny_model(tmp_path / "model")
    (model / place).write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(ArtifactError):
        open_artifact(model)
        load(str(model))
        raise AssertionError("nothing was wrong with it")
    assert not canary.exists()


def test_remote_code_is_not_looked_at(tmp_path: Path, canary: Path) -> None:
    """``auto_map`` names classes in files of the folder: a model with it is what the rest of its config says, and nothing is run."""
    model = tiny_model(tmp_path / "model")
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py", "conftest.py", "sitecustomize.py"):
        (model / name).write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    for name, entry in (
        ("config.json", {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_evil.Evil", None]}),
    ):
        config = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(config | {"auto_map": entry, "trust_remote_code": True, "tokenizer_class": "EvilTokenizer"}))
    assert open_artifact(model).model.num_layers == 4
    assert load(str(model)).table.size
    assert run(["--quiet", "convert", str(model), "-o", str(tmp_path / "out"), "-tp", "2"]) == 0
    assert not canary.exists()
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".py"], "code was copied along"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ lipsum.__globals__['os'].mkdir(%r) }}",
    "{{ cycler.__init__.__globals__.os.mkdir(%r) }}",
    "{{ self._TemplateReference__context.environment.globals }}",
    "{{ raise_exception.__globals__['datetime'].sys.modules['os'].mkdir(%r) }}",
    "{{ strftime_now.__globals__['datetime'].sys.modules['os'].mkdir(%r) }}",
    "{{ messages.__init__.__globals__ }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
    "{% include '/etc/passwd' %}",
    "{%% import 'os' as os %%}{{ os.mkdir(%r) }}",
]


def test_a_template_reaches_nothing(canary: Path) -> None:
    """In the process that renders for a router: the answer is a refusal or harmless text, and the canary never sings."""
    escapes = [escape % (str(canary),) if "%r" in escape else escape for escape in ESCAPES]
    sources = {
        f"m{index}": TemplateSource(templates={"default": TemplateFile(source=escape, origin="x")}, specials=(), tokens={})
        for index, escape in enumerate(escapes)
    }

    async def render_all() -> list[str]:
        cells = SandboxPool(sources, count=1)
        try:
            return [await _rendered(cells, name) for name in sources]
        finally:
            cells.close()

    for escape, shown in zip(escapes, asyncio.run(render_all()), strict=True):
        assert not any(word in shown for word in ("<module", "<class", "root:")), (escape, shown)
    assert not canary.exists()


async def _rendered(cells: SandboxPool, model: str) -> str:
    try:
        pieces = await cells.render(RenderJob(model=model, messages=[{"role": "user", "content": "hi"}]))
    except Rejected as error:
        return str(error)
    return "".join(piece.text for piece in pieces)


# --- S9: files that are not files, and paths that lead elsewhere


def special(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["FIFO", "device"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
def test_a_tokenizer_that_is_no_file(tmp_path: Path, name: str, kind: str) -> None:
    folder = tiny_tokenizer(tmp_path / "tokenizer")
    special(folder / name, kind)
    assert str(folder / name) in str(_refusal(lambda: load(str(folder))))


@pytest.mark.parametrize("kind", ["FIFO", "device"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_that_is_no_file(tmp_path: Path, name: str, kind: str) -> None:
    model = tiny_model(tmp_path / "model")
    special(model / name, kind)
    assert str(model) in str(_refusal(lambda: open_artifact(model)))


@pytest.mark.parametrize("kind", ["FIFO", "device"])
@pytest.mark.parametrize("name", ["config.json", "manifest.json", "rank0.safetensors"])
def test_a_checkpoint_that_is_no_file(tmp_path: Path, name: str, kind: str) -> None:
    model = tiny_model(tmp_path / "model")
    assert run(["--quiet", "convert", str(model), "-o", str(tmp_path / "out")]) == 0
    special(tmp_path / "out" / name, kind)
    code: list[int] = []
    _within(lambda: code.append(run(["inspect", str(tmp_path / "out"), "--verify"])))
    assert code == [ArtifactError.exit_code]


def _refusal(open_it: Callable[[], object]) -> ArtifactError:
    found: list[ArtifactError] = []

    def attempt() -> None:
        try:
            open_it()
        except ArtifactError as error:
            found.append(error)

    _within(attempt)
    assert found, "it was taken"
    return found[0]


def _within(work: Callable[[], object]) -> None:
    """Run ``work``, which must not wait for a writer that never comes, nor read without end."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it reads what is no file"


@pytest.mark.parametrize("target", ["../../../etc/passwd", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_that_leads_out_of_its_folder(tmp_path: Path, target: str) -> None:
    model = tiny_model(tmp_path / "model", files=2)
    index = model / "model.safetensors.index.json"
    written = json.loads(index.read_text())
    first = min(written["weight_map"])
    written["weight_map"][first] = target
    index.write_text(json.dumps(written))
    error = _refusal(lambda: open_artifact(model))
    assert "points outside the folder" in str(error) and "root:" not in str(error)
