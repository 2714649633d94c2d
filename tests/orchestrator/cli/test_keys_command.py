"""`trireme keys` as a terminal has it, and that a deployment beyond this host needs what it makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.auth.api_keys import KeyLimits, KeyTerms
from orchestrator.auth.keyring import ApiKeyRing, KeyRing, read_pass
from orchestrator.cli.main import run
from orchestrator.config.deployment_file import load
from orchestrator.control.host.deployment import Deployment
from orchestrator.control.host.notices import Notice
from workers.protocol.errors import ConfigError

Capture = pytest.CaptureFixture[str]
MODELS = {"models": [{"name": "m"}]}


def keys(capsys: Capture, run_dir: Path, *line: str) -> tuple[int, str, str]:
    code = run(["keys", *line, "--run-dir", str(run_dir)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_an_api_key_is_shown_once(tmp_path: Path, capsys: Capture) -> None:
    code, key, said = keys(capsys, tmp_path, "api", "add", "alice", "--models", "a,b", "--models", "c")
    assert code == 0 and key.startswith("trireme-") and key.count("\n") == 1 and key.strip() not in said
    file = tmp_path / "local" / "keys" / "api.json"
    row = ApiKeyRing(file).rows()[0]
    assert str(file) in said and row.models == ("a", "b", "c")
    code, shown, _ = keys(capsys, tmp_path, "api", "list")
    assert code == 0 and shown.split()[5:8] == [row.id, "alice", "a,b,c"]
    assert keys(capsys, tmp_path, "api", "revoke", row.id)[0] == 0
    assert keys(capsys, tmp_path, "api", "revoke", row.id)[0] == 2
    other = tmp_path / "other.json"
    assert keys(capsys, tmp_path, "api", "add", "bob", "--file", str(other))[0] == 0
    assert [row.tenant for row in ApiKeyRing(other).rows()] == ["bob"] and not ApiKeyRing(file).rows()


def test_limits_of_a_key_are_given_changed_and_shown(tmp_path: Path, capsys: Capture) -> None:
    options = ("--rpm", "60", "--tpm", "100000", "--concurrency", "4", "--weight", "2.5", "--priority", "-1")
    assert keys(capsys, tmp_path, "api", "add", "alice", *options)[0] == 0
    assert keys(capsys, tmp_path, "api", "add", "bob")[0] == 0
    found = ApiKeyRing(tmp_path / "local" / "keys" / "api.json")
    assert found.rows()[0].terms == KeyTerms(limits=KeyLimits(rpm=60, tpm=100000, concurrency=4), weight=2.5, most_urgent=-1)
    _, shown, _ = keys(capsys, tmp_path, "api", "list")
    assert shown.splitlines()[1].endswith("60 rpm, 100000 tpm, 4 at once, weight 2.5, priority -1") and shown.splitlines()[2].endswith("-")
    code, _, said = keys(capsys, tmp_path, "api", "limit", "alice", "--rpm", "0", "--tpm", "5")
    assert code == 0 and found.rows()[0].id in said
    assert found.rows()[0].terms == KeyTerms(limits=KeyLimits(tpm=5, concurrency=4), weight=2.5, most_urgent=-1), "the rest stays"
    assert found.rows()[1].terms == KeyTerms()
    assert keys(capsys, tmp_path, "api", "limit", "carol", "--rpm", "1")[0] == 2
    code, _, said = keys(capsys, tmp_path, "api", "limit", "bob", "--tpm", str(10**15))
    assert code == 2 and "limits are at most" in said
    for bad in (("--rpm", "-1"), ("--weight", "0"), ("--weight", "nan"), ("--priority", "10"), ("--tpm", "x")):
        assert keys(capsys, tmp_path, "api", "limit", "bob", *bad)[0] == 2, bad
    assert found.rows()[1].terms == KeyTerms()


def test_clients_and_the_list_of_files(tmp_path: Path, capsys: Capture) -> None:
    assert keys(capsys, tmp_path, "show")[0] == 2
    code, file, said = keys(capsys, tmp_path, "client", "inside", "--models", "m")
    ring = KeyRing(tmp_path / "local" / "keys")
    assert code == 0 and Path(file.strip()) == ring.path("client", "inside")
    assert ring.pair("router", "all").public in said and ring.pair("client", "inside").secret not in file + said
    code, shown, _ = keys(capsys, tmp_path, "show")
    assert (
        code == 0 and "client-inside.json   0600   key pair of client inside" in shown and ring.pair("client", "inside").secret not in shown
    )
    ring.salt_file.chmod(0o640)
    code, shown, said = keys(capsys, tmp_path, "show")
    assert code == ConfigError.exit_code and "0640" in shown and "chmod 600" in said
    ring.salt_file.chmod(0o600)
    assert keys(capsys, tmp_path, "client", "inside", "--revoke")[0] == 0 and not Path(file.strip()).exists()


def test_a_pass_is_a_file_and_its_models_are_listed(tmp_path: Path, capsys: Capture) -> None:
    code, file, said = keys(capsys, tmp_path, "join", "slurm", "--models", "a,b")
    held = read_pass(Path(file.strip()))
    assert code == 0 and held.models == ("a", "b") and not any(pair.secret in file + said for pair in (held.replica, held.client))
    code, shown, _ = keys(capsys, tmp_path, "show")
    assert code == 0 and "pass for the replicas of slurm   a,b" in shown
    assert keys(capsys, tmp_path, "join", "slurm", "--revoke")[0] == 0 and not Path(file.strip()).exists()
    assert keys(capsys, tmp_path, "join", "slurm", "--revoke")[0] == 2


def test_other_hosts_need_keys_or_one_explicit_word(tmp_path: Path) -> None:
    outside = {"host": "0.0.0.0"}
    with pytest.raises(ConfigError) as caught:
        load(MODELS, flags=outside)
    assert "http.host" in caught.value.what and "keys api add" in caught.value.hint
    load(MODELS, flags=outside, env={"TRIREME_INSECURE_HTTP_WITHOUT_KEYS": "true"})
    notices: list[Notice] = []
    open_to_all = load(MODELS, flags=outside | {"insecure_http_without_keys": True, "run_dir": str(tmp_path), "launcher": "local"}).config
    for _ in range(2):
        Deployment(open_to_all, notify=notices.append)._check_api_keys()
    assert [notice.kind for notice in notices] == ["warning", "warning"]
    keyed = load(
        MODELS, flags=outside | {"launcher": "local", "api_keys_file": str(tmp_path / "none.json"), "insecure_http_without_tls": True}
    ).config
    with pytest.raises(ConfigError, match=r"cannot read the key file .*none\.json"):
        Deployment(keyed, notify=notices.append)._check_api_keys()
    ApiKeyRing(tmp_path / "none.json").add("alice", [])
    Deployment(keyed, notify=notices.append)._check_api_keys()
    assert len(notices) == 3 and "no TLS" in notices[2].text
