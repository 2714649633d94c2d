"""Secrets stay in files that only their owner reads."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import zmq

from orchestrator.auth.curve_acl import CurveAcl, parse_grants
from orchestrator.auth.keyring import KeyRing
from orchestrator.files import read_private
from workers.protocol.errors import ConfigError, NotFound, Rejected


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_pairs_are_made_once_and_work(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys")
    pair = ring.pair("replica", "a")
    assert KeyRing(tmp_path / "keys").pair("replica", "a") == pair
    assert zmq.curve_public(pair.secret.encode()).decode() == pair.public
    assert pair.secret not in repr(pair)
    assert mode(ring.folder) == 0o700
    assert {mode(path) for path in ring.folder.iterdir()} == {0o600}
    assert len(ring.salt_file.read_bytes()) == 32 and KeyRing(tmp_path / "keys").salt_file.read_bytes() == ring.salt_file.read_bytes()


def test_a_replicas_key_speaks_for_its_own_name_only(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys")
    ring.allow([("replica", "a"), ("client", "local")])
    gate = CurveAcl(parse_grants(ring.allowed_file.read_bytes()))
    a, client = ring.pair("replica", "a").public, ring.pair("client", "local").public
    assert gate.admits(a, "replica") and gate.may_be(a, "a", "m") and not gate.may_be(a, "b", "m") and not gate.admits(a, "client")
    assert gate.admits(client, "client") and not gate.admits(client, "replica")
    ring.allow([("replica", "a"), ("replica", "b")], {"a": "m"})
    gate = CurveAcl(ring.grants())
    assert gate.may_be(a, "a", "m") and not gate.may_be(a, "a", "n") and gate.may_be(ring.pair("replica", "b").public, "b", "n")
    ring.allow([("client", "local")])
    assert a not in parse_grants(ring.allowed_file.read_bytes())


def test_open_or_broken_files_are_refused_without_quoting_them(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys")
    path = ring.path("client", "local")
    secret = ring.pair("client", "local").secret
    path.chmod(0o644)
    with pytest.raises(ConfigError) as caught:
        ring.pair("client", "local")
    assert str(path) in caught.value.what and "0644" in caught.value.why and secret not in caught.value.lines()
    path.chmod(0o600)
    path.write_text('{"public": "short", "secret": "planted"}')
    with pytest.raises(ConfigError) as caught:
        ring.pair("client", "local")
    assert "planted" not in caught.value.lines()
    with pytest.raises(ConfigError, match="cannot read"):
        read_private(tmp_path / "none")


def test_admitted_clients_outlast_a_deployments_own_list(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys")
    ring.allow([("client", "local"), ("router", "all")])
    file = ring.admit_client("alice", ["m"])
    assert mode(file) == mode(ring.allowed_file) == 0o600
    alice = ring.pair("client", "alice").public
    ring.allow([("client", "local"), ("router", "all"), ("replica", "a")])
    gate = CurveAcl(ring.grants())
    assert gate.admits(alice, "client") and gate.tenant(alice).name == "alice" and gate.tenant(alice).models == ("m",)
    assert gate.tenant(ring.pair("client", "local").public).models is None
    ring.remove_client("alice")
    assert not CurveAcl(ring.grants()).admits(alice, "client") and CurveAcl(ring.grants()).tenant(alice).models == () and not file.exists()
    with pytest.raises(NotFound):
        ring.remove_client("alice")
    for name in ("local", "../x", ""):
        with pytest.raises(Rejected):
            ring.admit_client(name, [])
