"""Which deployment a command means: the one that runs, wherever its port is; several are asked for a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.auth.keyring import ApiKeyRing
from orchestrator.cli.generate_request import DEFAULT_URL, http_address
from orchestrator.cli.main import run
from tests.support.running import seeming_deployment
from workers.protocol.errors import NotFound, Rejected, Unavailable

A, B, ELSEWHERE = "http://127.0.0.1:18001", "http://127.0.0.1:18002", "https://llm.example.org"


@pytest.fixture(autouse=True)
def _no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIREME_URL", raising=False)


def test_the_http_address_is_that_of_the_deployment_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(tmp_path)
    assert http_address("", "", here) == DEFAULT_URL
    with seeming_deployment(tmp_path, "one", A):
        assert http_address("", "", here) == http_address("", "one", here) == A
        assert http_address(ELSEWHERE, "", here) == ELSEWHERE
        with seeming_deployment(tmp_path, "two", B), pytest.raises(Rejected, match="2 deployments run") as found:
            http_address("", "", here)
        assert found.value.why == "one, two" and "--name" in found.value.hint
        with pytest.raises(Rejected, match="--url and --name"):
            http_address(ELSEWHERE, "one", here)
        monkeypatch.setenv("TRIREME_URL", ELSEWHERE)
        assert http_address("", "", here) == ELSEWHERE and http_address("", "one", here) == A
    with pytest.raises(NotFound, match="two does not run"):
        http_address("", "two", here)
    with seeming_deployment(tmp_path, "young"), pytest.raises(Unavailable, match="young has no HTTP address"):
        http_address("", "young", here)


@pytest.mark.parametrize("line", [["chat", "hello"], ["generate", "hello"], ["bench", "-n", "1"], ["bench", "--rpc", "-n", "1"]])
def test_every_asking_command_looks_for_it(line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*line, "--run-dir", str(tmp_path)]
    with seeming_deployment(tmp_path, "one", "http://127.0.0.1:9"):
        assert run(line) != 0
        assert ("one has no router" if "--rpc" in line else "nothing answers at http://127.0.0.1:9") in capsys.readouterr().err
        with seeming_deployment(tmp_path, "two", B):
            assert run(line) == 2
            assert "why: one, two\nhint: name one with --name" in capsys.readouterr().err


def test_keys_are_of_the_deployment_that_runs_or_the_only_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def add(*flags: str) -> int:
        return run(["keys", "api", "add", "tenant", "--run-dir", str(tmp_path), *flags])

    def count(name: str) -> int:
        return len(ApiKeyRing(tmp_path / name / "keys" / "api.json").rows())

    assert add("--name", "chat") == add() == 0
    assert count("chat") == 2
    assert add("--name", "other") == 0
    capsys.readouterr()
    assert add() == 2
    assert "why: chat, other\nhint: name one with --name" in capsys.readouterr().err
    with seeming_deployment(tmp_path, "other", A):
        assert add() == 0
        assert (count("chat"), count("other")) == (2, 2)
        with seeming_deployment(tmp_path, "chat", B):
            assert add() == 2 and add("--name", "chat") == 0
