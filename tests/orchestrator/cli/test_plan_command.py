"""`trireme plan` as a user runs it: files, devices, tables, JSON and exit codes. No GPU, no Ray, no weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from orchestrator.cli.main import run
from orchestrator.planner.devices import GPU_FIT
from tests.support.tiny_models import tiny_model

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"

MODEL = {"name": "llama-3.1-70b", "device": "cuda", "dtype": "bf16", "max_batch_size": 256, "max_num_tokens": 8192, "max_seq_len": 8192}


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores and 16 GB free, whatever this machine has to spare at the moment."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=16 * 10**9))


def write(folder: Path, *models: dict[str, object]) -> str:
    file = folder / "file.yaml"
    file.write_text(yaml.safe_dump({"name": "planned", "models": list(models)}))
    return str(file)


def test_a_table_marks_the_files_layout_and_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", write(tmp_path, MODEL | {"tp_size": 4}), "--gpus", "8xH100,nodes=2"]) == 0
    told = capsys.readouterr().out
    assert "llama-3.1-70b: 70.6 billion parameters, bf16, on 2 nodes of 8 x H100" in told
    rows = [line for line in told.splitlines() if line.startswith("tp=") and ("%" in line or " ? " in line)]
    assert rows[0].startswith("tp=4 pp=1") and rows[0].endswith("the file's")
    assert sum("most tokens" in row for row in rows) == 1 and sum("quickest token" in row for row in rows) == 1
    assert "0 to 3" in told and "decode-heavy" in told and "twice the root mean square" in told
    assert "hint: tp_size: " in told


def test_json_is_whole_and_the_tables_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", write(tmp_path, MODEL | {"tp_size": 4}), "--gpus=4xh200", "-o", "json", "--isl", "100", "--osl", "28"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["fits"] and model["refusal"] is None and model["load"] == {"isl": 100, "osl": 28}
    own = model["layouts"][0]
    assert (
        own["parallel"] == {"tp": 4, "pp": 1, "expert_parallel": False}
        and "the file's" in own["marks"]
        and own["settings"].startswith("tp_size: 4")
    )
    assert len(own["ranks"]) == 4 and own["kv_tokens"] == min(rank["kv_tokens"] for rank in own["ranks"])
    assert own["workloads"]["balanced"]["output_tok_s"] > 0 and own["error"] == GPU_FIT.error


def test_what_does_not_fit_ends_with_3_and_says_what_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, MODEL | {"tp_size": 1})
    assert run(["plan", file, "--gpus", "8xH100"]) == 3
    told = capsys.readouterr()
    assert "error: llama-3.1-70b: rank 0 of tp=1 pp=1 does not fit on an H100" in told.err
    assert "hint: use tp_size: " in told.err and "most tokens" in told.out
    assert run(["plan", file, "--gpus", "1xH100", "-o", "json"]) == 3
    told = capsys.readouterr()
    assert json.loads(told.out)["models"][0]["fits"] is False and "hint: use 2 x H100 with tp_size: 2" in told.err


def test_what_is_left_open_is_planned_for_the_named_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that names a model alone: bf16 on as few H100s as hold it, with the steps of a large GPU."""
    assert run(["plan", write(tmp_path, {"name": "llama-3.1-70b", "max_seq_len": 8192}), "--gpus", "8xH100", "-o", "json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["cluster"]["device"]["name"] == "H100" and model["layouts"][0]["parallel"] == {"tp": 2, "pp": 1, "expert_parallel": False}
    assert run(["plan", write(tmp_path, {"name": "smollm2-135m-instruct"}), "--gpus", "1xH100", "-o", "json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["layouts"][0]["parallel"] == {"tp": 1, "pp": 1, "expert_parallel": False}


def test_a_folder_with_a_config_alone_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model(tmp_path / "m", heads=9, kv_heads=3)
    (folder / "model.safetensors").unlink()
    file = write(tmp_path, {"name": "m", "path": str(folder), "tp_size": 2, "kv_tokens": 1000}, {"name": "f", "engine": "fake"})
    assert run(["plan", file, "--cpus", "2,memory=4GiB", "--isl", "16", "--osl", "16"]) == 0
    told = capsys.readouterr().out
    assert "tp=2 pp=1" in told and "1,008" in told and "f:" not in told


def test_the_examples_for_one_machine_fit_on_a_small_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Two cores and 16 GB free are enough for four ranks: the deployment's own Ray grants every rank a share."""
    for name in ("local", "ha"):
        assert run(["plan", str(DEPLOY / "examples" / f"{name}.yaml")]) == 0
        assert "the file's" in capsys.readouterr().out


def test_gangs_that_run_differently_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replicas = [{"name": "a", "tp_size": 4}, {"name": "b", "tp_size": 2, "pp_size": 2}]
    assert run(["plan", write(tmp_path, MODEL | {"replicas": replicas}), "--gpus", "8xH100", "-o", "json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert [row["parallel"] for row in model["layouts"][:2]] == [
        {"tp": 4, "pp": 1, "expert_parallel": False},
        {"tp": 2, "pp": 2, "expert_parallel": False},
    ]
    mixed = {"name": "smollm2-135m-instruct", "replicas": [{"name": "a", "device": "cpu"}, {"name": "b"}]}
    assert run(["plan", write(tmp_path, mixed), "--gpus", "1xH100", "--cpus", "2", "-o", "json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [model["name"] for model in models] == ["smollm2-135m-instruct (a)", "smollm2-135m-instruct (b)"]
    assert [model["cluster"]["device"]["name"] for model in models] == ["CPU", "H100"]


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        ([], 3, "hint: add --gpus, such as --gpus 8xH100,nodes=2"),
        (["--gpus", "8xH900"], 2, "error: --gpus 8xH900: H900 is not a known GPU"),
        (["--gpus", "H100"], 2, "write COUNTxKIND"),
        (["--gpus", "0xH100"], 2, "'0' is not a count"),
        (["--gpus", "8xH100,nods=2"], 2, "'nods' is not known"),
        (["--gpus", "8xH100,nodes=two"], 2, "'two' is not a count"),
        (["--gpus", "8xH100", "-o", "xml"], 2, "use table or json"),
    ],
)
def test_devices_are_spelt_one_way(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, told: str) -> None:
    assert run(["plan", write(tmp_path, MODEL), *flags]) == code
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "flags", "told"),
    [
        ({"name": "no-such-model"}, [], "shapes known by name are: smollm2-135m-instruct, qwen3-8b"),
        ({"name": "f", "engine": "fake"}, [], "only fake engines"),
        ({"name": "smollm2-135m-instruct", "device": "cpu"}, ["--gpus", "8xH100"], "hint: leave device out of it"),
        ({"name": "smollm2-135m-instruct"}, ["--cpus", "2,memory=much"], "write 16GB or 16GiB"),
        ({"name": "smollm2-135m-instruct", "dtype": "fp32"}, ["--cpus", "2,memory=1GB"], "its share of the host"),
    ],
)
def test_what_cannot_be_planned_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: dict[str, object], flags: list[str], told: str
) -> None:
    assert run(["plan", write(tmp_path, model), *flags]) in (2, 3)
    assert told in capsys.readouterr().err


def test_planning_needs_neither_torch_nor_ray_nor_mpi(tmp_path: Path) -> None:
    program = (
        "import sys; from orchestrator.cli.main import run; code = run(sys.argv[1:]);"
        "print(*sorted({'torch', 'ray', 'mpi4py', 'zmq'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    argv = [sys.executable, "-c", program, "plan", write(tmp_path, MODEL | {"tp_size": 8}), "--gpus", "8xH100"]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr.strip()) == (0, "")


def rendered(file: str, kind: str, capsys: pytest.CaptureFixture[str], gpus: str = "8xH100,nodes=2") -> str:
    assert run(["plan", file, "--gpus", gpus, "--render", kind]) == 0
    return capsys.readouterr().out


def test_the_slurm_job_is_the_one_that_would_be_submitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, MODEL | {"tp_size": 4, "pp_size": 3})
    told = rendered(file, "slurm", capsys)
    assert run(["submit", "slurm", file, "--nodes", "2", "--gpus-per-node", "8", "--cpus-per-task", "10", "--dry-run"]) == 0
    assert told == capsys.readouterr().out


def test_the_ray_job_differs_from_the_manifest_in_its_sizes_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, MODEL | {"tp_size": 4, "pp_size": 3, "cpus_per_rank": 2})
    config, job = yaml.safe_load_all(rendered(file, "ray", capsys))
    assert config["metadata"]["name"] == "trireme-ray" and config["data"] == {"deployment.yaml": Path(file).read_text()}
    manifest = yaml.safe_load((DEPLOY / "ray/kuberay/rayjob.yaml").read_text())
    (group,), (given,) = (each["spec"]["rayClusterSpec"]["workerGroupSpecs"] for each in (job, manifest))
    assert (group["replicas"], group["maxReplicas"]) == (2, 2)
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == 8 and resources["requests"]["cpu"] == "18"
    given |= {name: group[name] for name in ("replicas", "maxReplicas")}
    given["template"]["spec"]["containers"][0]["resources"] = resources
    assert job == manifest


def test_the_kustomization_builds_on_the_manifests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, MODEL | {"tp_size": 4})
    (found,) = yaml.safe_load_all(rendered(file, "kubernetes", capsys))
    overlays = DEPLOY / "kubernetes" / "overlays"
    assert [(overlays / "planned" / folder).resolve() for folder in found["resources"]] == [overlays / "gpu"]
    assert found["configMapGenerator"] == [{"name": "trireme", "behavior": "replace", "files": ["deployment.yaml=file.yaml"]}]
    patch = yaml.safe_load(found["patches"][0]["patch"])
    given = yaml.safe_load((DEPLOY / "kubernetes/base/statefulset.yaml").read_text())
    assert [patch[key] for key in ("apiVersion", "kind", "metadata")] == [given[key] for key in ("apiVersion", "kind", "metadata")]
    (container,) = patch["spec"]["template"]["spec"]["containers"]
    assert container["name"] in [each["name"] for each in given["spec"]["template"]["spec"]["containers"]]
    assert container["resources"] == {
        "requests": {"cpu": "6", "memory": "128Gi"},
        "limits": {"memory": "128Gi", "nvidia.com/gpu": 4},
    }


@pytest.mark.parametrize(
    ("model", "flags", "told"),
    [
        (MODEL | {"tp_size": 4, "pp_size": 3}, ["--render", "kubernetes"], "hint: use --render ray"),
        (MODEL | {"tp_size": 1}, ["--render", "slurm"], "does not fit on an H100"),
        (MODEL | {"tp_size": 4}, ["--render", "nomad"], "hint: use slurm, ray, kubernetes"),
    ],
)
def test_a_job_that_cannot_be_is_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: dict[str, object], flags: list[str], told: str
) -> None:
    assert run(["plan", write(tmp_path, model), "--gpus", "8xH100,nodes=2", *flags]) in (2, 3)
    output = capsys.readouterr()
    assert told in output.err and output.out == ""


def test_kustomize_takes_the_kustomization(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not here")
    file = Path(write(tmp_path, MODEL | {"tp_size": 4}))
    shutil.copytree(DEPLOY / "kubernetes", tmp_path / "kubernetes")
    overlay = tmp_path / "kubernetes/overlays/planned"
    overlay.mkdir()
    shutil.copy(file, overlay)
    (overlay / "kustomization.yaml").write_text(rendered(str(file), "kubernetes", capsys))
    done = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}
    assert found["ConfigMap"]["data"] == {"deployment.yaml": file.read_text()}
    container = next(each for each in found["StatefulSet"]["spec"]["template"]["spec"]["containers"] if each["name"] == "trireme")
    assert container["resources"]["limits"] == {"memory": "128Gi", "nvidia.com/gpu": 4}
