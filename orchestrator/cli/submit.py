"""`trireme submit slurm`: a deployment file as a Slurm job. Owns the output of the command; the script belongs to `orchestrator.slurm`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.command_group import CommandGroup
from orchestrator.cli.console import Console
from workers.protocol.errors import ConfigError

#: Parts of the longest socket path below the jobs folder.
LONGEST_ID, SOCKET, LONGEST_PATH = "0" * 10, "/routers/router00-back.sock", 100

submit = typer.Typer(name="submit", cls=CommandGroup, help="Deployments as jobs of the site's scheduler.", no_args_is_help=True)


@submit.command("slurm")
def slurm(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(help="A deployment file, such as deploy/examples/local.yaml, which `trireme config examples` writes.")
    ],
    account: Annotated[str, typer.Option("--account", "-A", help="Account that pays for the job.")] = "",
    partition: Annotated[str, typer.Option("--partition", "-p", help="Partition; by default the site's.")] = "",
    time: Annotated[str, typer.Option("--time", "-t", metavar="LIMIT", help="Minutes, HH:MM:SS or D-HH:MM:SS.")] = "",
    nodes: Annotated[int, typer.Option("--nodes", "-N", min=1, help="How many nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=0, help="GPUs on each node.")] = 0,
    cpus_per_task: Annotated[int, typer.Option("--cpus-per-task", "-c", min=0, help="CPUs on each node.")] = 0,
    container: Annotated[str, typer.Option("--container", metavar="IMAGE", help="Run in this image (pyxis).")] = "",
    container_mounts: Annotated[str, typer.Option("--container-mounts", metavar="A:B,...", help="Folders to mount: models and keys.")] = "",
    python: Annotated[str, typer.Option("--python", help="Python on the nodes; by default this one, or python3 of the image.")] = "",
    array: Annotated[str, typer.Option("--array", "-a", metavar="N|0-N", help="Number of deployments, one task each.")] = "",
    handover: Annotated[bool, typer.Option("--handover/--no-handover", help="Submit a successor before the time limit.")] = True,
    lead: Annotated[int, typer.Option("--lead", min=0, metavar="S", help="Seconds before the limit at which this happens.")] = 0,
    name: Annotated[str, typer.Option("--name", help="Name of the job; by default the deployment's.")] = "",
    job_dir: Annotated[Path, typer.Option("--job-dir", help="Folder on a shared file system for scripts, logs and state.")] = Path(
        "trireme-jobs"
    ),
    sbatch: Annotated[list[str] | None, typer.Option("--sbatch", metavar="OPTION", help="A further option of sbatch; repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script and submit nothing.")] = False,
) -> None:
    """Submit a deployment to Slurm. The endpoint is printed in the job's log and written to DIR/NAME.json when it is ready."""
    import sys

    from orchestrator.config import deployment_file as configs
    from orchestrator.slurm import job_script as jobs
    from orchestrator.slurm.handover import least_lead

    console: Console = context.obj
    config = configs.load(file, env=os.environ).config
    job = jobs.SlurmJob(
        name=name or config.name,
        jobs=str(job_dir.expanduser().absolute()),
        account=account,
        partition=partition,
        time=time,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        container=container,
        container_mounts=container_mounts,
        array=f"0-{int(array) - 1}" if array.isdigit() and int(array) > 0 else array,
        handover=handover,
        lead_s=lead,
        options=tuple(sbatch or ()),
        python=python or ("python3" if container else sys.executable),
    )
    if job.lead < (least := least_lead(config.drain_grace_s)):
        raise ConfigError(f"{job.lead} s before the time limit are too few", f"a drain may take {least:.0f} s (drain_grace_s and its end)",
                          "raise --time or --lead, or lower drain_grace_s")  # fmt: skip
    if config.launcher == "local" and nodes > 1:
        raise ConfigError(f"launcher: local on {nodes} nodes", "without Ray the other nodes would idle", "launcher: ray, or --nodes 1")
    if len(f"{job.jobs}/{job.name}-{LONGEST_ID}{SOCKET}") > LONGEST_PATH:
        raise ConfigError(f"{job.jobs} is too long for Unix sockets", "their paths end at 107 bytes", "choose a shorter --job-dir")
    if dry_run:
        console.out(jobs.render(job, jobs.TEMPLATE.read_text()), end="")
        return
    if not config.join.file:
        if not config.http.exposed:
            console.warn(f"http.host is {config.http.host}: only processes on the job's first node will reach it")
        if handover:
            console.warn(
                f"the deployment has routers of its own (no join.file): a successor will have another URL, which {job.name}.json tells"
            )
    number = jobs.submit(job, file.read_bytes())
    console.say(f"submitted job {number}", job=number, script=str(job.script))
    console.say(f"  endpoint, when ready: {job.jobs}/{job.name}.json\n  log: {job.jobs}/{job.name}-{number}.log")
    console.out(number)
