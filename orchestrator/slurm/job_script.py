"""A deployment as a Slurm job: `serve.sbatch` rendered, written and handed to sbatch.

Owns the script and the copy of the deployment file that lie under the jobs folder. Rendering is pure; must never run a shell nor let a
value reach one unquoted.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec

from orchestrator.files import SHIPPED, write_private
from workers.protocol.errors import EnvironmentFault, Rejected

TEMPLATE = SHIPPED / "slurm" / "serve.sbatch"
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,26}[a-z0-9])?")
_WORD = re.compile(r"[A-Za-z0-9_.,:+/@=*%-]+")
_BLANK = re.compile(r"\{\{(\w+)\}\}")
_TIMES = (
    (re.compile(r"(\d+)"), (60,)),
    (re.compile(r"(\d+):(\d+)"), (60, 1)),
    (re.compile(r"(\d+):(\d+):(\d+)"), (3600, 60, 1)),
    (re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?"), (86400, 3600, 60, 1)),
)
#: What a hand-over is given when the time limit allows it: a queue, a start, a drain.
LEAD_S = 600
#: Slurm looks at time limits this often and may signal as much too early, seconds.
EARLY_S = 60
_ANSWER_S = 60.0


class SlurmJob(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask Slurm for. ``jobs``: folder on a file system that all nodes share; ``file``: the deployment's YAML in it.

    ``time``: a limit in Slurm's forms, empty = the partition's. ``lead_s``: seconds before the limit at which the job hands over to its
    successor (or just drains); 0 = as long as the limit allows, at most 10 minutes. ``options``: more of sbatch's own, whole words.
    Raises :class:`Rejected` on what cannot stand in a Slurm script.
    """

    name: str
    jobs: str
    account: str = ""
    partition: str = ""
    time: str = ""
    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    container: str = ""
    container_mounts: str = ""
    array: str = ""
    handover: bool = True
    lead_s: int = 0
    options: tuple[str, ...] = ()
    python: str = sys.executable

    def __post_init__(self) -> None:
        _check(_NAME.fullmatch(self.name) is not None, f"{self.name!r} cannot name a job",
               "a job's deployment is called NAME-JOBID: 1 to 28 of a-z, 0-9, '.' and '-'", "choose another with --name")  # fmt: skip
        _check(self.nodes >= 1, f"--nodes {self.nodes} is not possible", "a job has at least one node", "leave it out for one")
        for flag in ("account", "partition", "time", "array"):
            value = getattr(self, flag)
            _check(
                not value or _WORD.fullmatch(value) is not None, f"--{flag} {value!r} is not a word that Slurm knows", "", "sbatch --help"
            )
        for option in self.options:
            _check(option.startswith("-") and "\n" not in option, f"{option!r} is not an option of sbatch", "it begins with a dash",
                   "--sbatch=--qos=high")  # fmt: skip
        limit = limit_seconds(self.time)
        _check(limit is None or not self.lead_s or self.lead_s + EARLY_S < limit, f"a lead of {self.lead_s} s leaves no time to serve",
               f"the limit is {limit} s, and Slurm may signal {EARLY_S} s early", "raise --time or lower --lead")  # fmt: skip

    @property
    def lead(self) -> int:
        """Seconds between Slurm's signal and the time limit."""
        limit = limit_seconds(self.time)
        return self.lead_s or (LEAD_S if limit is None else min(LEAD_S, limit // 2))

    @property
    def script(self) -> Path:
        return Path(self.jobs, f"{self.name}.sbatch")

    @property
    def file(self) -> Path:
        return Path(self.jobs, f"{self.name}.yaml")


def limit_seconds(text: str) -> int | None:
    """A time limit in seconds; None without one. Raises :class:`Rejected` on a form that Slurm does not have."""
    if not text or text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    for form, units in _TIMES:
        if found := form.fullmatch(text):
            return sum(int(part or 0) * unit for part, unit in zip(found.groups(), units, strict=True))
    raise Rejected(f"--time {text!r} is not a time limit", "", "minutes, HH:MM:SS, D-HH or D-HH:MM:SS")


def render(job: SlurmJob, template: str) -> str:
    """The script, whole. Every blank of the template is filled, and none is left."""
    container = [f"--container-image={job.container}"] if job.container else []
    if job.container:
        mounts = [f"{job.jobs}:{job.jobs}", *filter(None, [job.container_mounts])]
        container += [f"--container-mounts={','.join(mounts)}"]
    blanks = {
        "directives": "\n".join(f"#SBATCH {line}" for line in _directives(job)),
        "name": shlex.quote(job.name),
        "jobs": shlex.quote(job.jobs),
        "script": shlex.quote(str(job.script)),
        "file": shlex.quote(str(job.file)),
        "python": shlex.quote(job.python),
        "container": shlex.join(container),
        "lead": str(job.lead if job.handover else 0),
    }
    return _BLANK.sub(lambda found: blanks[found.group(1)], template)


def _directives(job: SlurmJob) -> list[str]:
    wanted = [
        ("job-name", job.name),
        ("account", job.account),
        ("partition", job.partition),
        ("time", job.time),
        ("nodes", str(job.nodes)),
        ("gpus-per-node", str(job.gpus_per_node or "")),
        ("cpus-per-task", str(job.cpus_per_task or "")),
        ("array", job.array),
        ("output", f"{job.jobs}/{job.name}-%j.log"),
        ("signal", f"B:{'USR1' if job.handover else 'TERM'}@{job.lead}"),
    ]
    lines = [f"--{flag}={_directive(value)}" for flag, value in wanted if value]
    return lines + [_directive(option) for option in job.options]


def _directive(value: str) -> str:
    """A value on an ``#SBATCH`` line, which knows double quotes and nothing else of the shell."""
    return value if _WORD.fullmatch(value) else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def submit(job: SlurmJob, deployment: bytes) -> str:
    """Write the script and the deployment file, and submit; returns the job's id. Raises :class:`EnvironmentFault` when Slurm refuses."""
    folder = Path(job.jobs)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"cannot make {folder}", error.strerror or str(error), "choose another --job-dir") from None
    write_private(job.file, deployment)
    write_private(job.script, render(job, TEMPLATE.read_text()).encode())
    try:
        ran = subprocess.run(["sbatch", "--parsable", str(job.script)], capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except FileNotFoundError:
        hint = "run this on a login node, or use --dry-run"
        raise EnvironmentFault("there is no Slurm here", "sbatch was not found", hint) from None
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(
            "Slurm does not answer", f"sbatch took more than {_ANSWER_S:.0f} s", "ask squeue whether it was taken"
        ) from None
    if ran.returncode:
        said = ran.stderr.strip().splitlines()
        raise EnvironmentFault(
            "Slurm refused the job", said[-1] if said else f"sbatch returned {ran.returncode}", f"the script: {job.script}"
        )
    return ran.stdout.strip().partition(";")[0]


def _check(ok: bool, what: str, why: str, hint: str) -> None:
    if not ok:
        raise Rejected(what, why, hint)
