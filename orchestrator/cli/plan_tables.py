"""A plan as tables and as JSON: layouts, the memory of one rank and the recorded workloads. Decides nothing."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import msgspec

from orchestrator.cli.console import table
from orchestrator.planner.cluster import PlannedCluster
from orchestrator.planner.cost_model import Workload
from orchestrator.planner.devices import GPU_FIT, HOST_FIT, GpuModel
from orchestrator.planner.planner import RECORDED_TOKENS, LayoutPlan, SubjectPlan, settings, timed
from workers.layout.sharding import active_parameters, parameters

#: Layouts that are listed in addition to the file's own.
SHOWN = 6
#: Tokens per step in the recorded runs on GPUs.
USUAL_TOKENS = 8192


def render(each: SubjectPlan, cluster: PlannedCluster, load: Workload) -> str:
    """Everything about one model, for a terminal."""
    subject = each.subject
    formats = f"{subject.quant.weights} weights, the rest {subject.engine.dtype}" if subject.quant.weights else subject.engine.dtype
    size = f"{parameters(subject.model) / 1e9:.3g} billion parameters"
    if subject.model.moes:
        size += f" ({active_parameters(subject.model) / 1e9:.3g} active)"
    parts = [f"{subject.name}: {size}, {formats}, on {cluster.what}; sequences of {load.isl} + {load.osl} tokens"]
    rows = marked(each)
    if rows:
        parts.append(_layouts(rows))
    for made in each.own or each.options[:1]:
        parts.append(_memory(made, load))
        if speeds := timed(subject, made, cluster.device):
            parts.append(_speeds(made, speeds))
    notes = dict.fromkeys(f"note: {_name(made)}: {note}" for made, _ in rows for note in made.notes)
    if last := [*notes, *_errors(rows, cluster), *_advice(each, cluster)]:
        parts.append("\n".join(last))
    return "\n\n".join(parts)


def facts(each: SubjectPlan, cluster: PlannedCluster, load: Workload) -> dict[str, Any]:
    """The same for a script: bytes, seconds and tokens, unrounded."""
    subject = each.subject
    refusal = each.refusal
    return {
        "name": subject.name,
        "cluster": msgspec.to_builtins(cluster),
        "load": {"isl": load.isl, "osl": load.osl},
        "parameters": parameters(subject.model),
        "active_parameters": active_parameters(subject.model),
        "fits": refusal is None,
        "refusal": {"error": refusal.what, "why": refusal.why, "hint": refusal.hint} if refusal else None,
        "layouts": [
            {
                **msgspec.to_builtins(made),
                "total_tok_s": made.total_tok_s,
                "marks": list(marks),
                "settings": settings(made),
                "workloads": {load.name: msgspec.to_builtins(run) for load, run in timed(subject, made, cluster.device)},
            }
            for made, marks in marked(each)
        ],
    }


def marked(each: SubjectPlan) -> list[tuple[LayoutPlan, tuple[str, ...]]]:
    """The listed layouts with a remark: the file's layouts first, then the best ones, in the order of tokens a second."""
    chosen = list(each.options[:SHOWN])
    if each.quickest is not None and each.quickest not in chosen:
        chosen.append(each.quickest)
    same = {(made.parallel, made.replicas) for made in each.own}
    rows = [*each.own, *(made for made in chosen if (made.parallel, made.replicas) not in same)]

    def marks(made: LayoutPlan) -> tuple[str, ...]:
        kind = (made.parallel, made.replicas)
        reasons = [("the file's", kind in same)]
        reasons += [("most tokens", each.best is not None and kind == (each.best.parallel, each.best.replicas))]
        reasons += [("quickest token", each.quickest is not None and kind == (each.quickest.parallel, each.quickest.replicas))]
        reasons += [("crosses nodes", made.placement.crossings > 0)]
        return tuple(reason for reason, holds in reasons if holds)

    return [(made, marks(made)) for made in rows]


def _layouts(rows: list[tuple[LayoutPlan, tuple[str, ...]]]) -> str:
    header = ["LAYOUT", "REPLICAS", "WEIGHTS", "CACHE", "KV TOKENS", "SEQS"]
    header += ["MS/TOKEN 1 SEQ", "ALL SEQS", "TOK/S", "TOK/S IN ALL", "+-", ""]
    cells = []
    for made, marks in rows:
        one, full = made.one, made.full
        cells.append(
            [
                _name(made),
                str(made.replicas),
                _gb(max(rank.weights for rank in made.ranks)),
                _gb(min(rank.cache for rank in made.ranks)),
                f"{made.kv_tokens:,}",
                str(made.sequences),
                f"{one.token_ms:.2f}" if one else "-",
                f"{full.token_ms:.2f}" if full else "-",
                f"{full.output_tok_s:,.0f}" if full else "-",
                f"{made.total_tok_s:,.0f}" if full else "-",
                f"{made.error:.0%}" if made.error and full else "?",
                ", ".join(marks),
            ]
        )
    return table(header, cells)


def _memory(made: LayoutPlan, load: Workload) -> str:
    """Ranks with the same content share a line. A rank's sequences are those that its own cache can hold; all ranks bound the replica's."""
    rows, first = [], 0
    for rank, alike in groupby(made.ranks):
        count = len(list(alike))
        ranks = str(first) if count == 1 else f"{first} to {first + count - 1}"
        parts = (rank.weights, rank.step, rank.other, rank.cache, rank.total)
        rows.append([ranks, *map(_gb, parts), f"{rank.kv_tokens:,}", f"{rank.kv_tokens // (load.isl + load.osl):,}"])
        first += count
    header = ["RANK", "WEIGHTS", "STEP", "CONTEXT AND RESERVE", "CACHE", "OF", "KV TOKENS", "SEQS"]
    agreed = f"the replica takes the fewest KV tokens: {made.kv_tokens:,}, {made.longest:.1f} of the longest sequences"
    return f"{_name(made)}, memory of each rank; {agreed}\n{table(header, rows)}"


def _speeds(made: LayoutPlan, speeds: list[tuple[Workload, Any]]) -> str:
    rows = [
        [load.name, str(load.requests), f"{load.isl} + {load.osl}", f"{run.seconds:.2f}", f"{run.token_ms:.2f}", f"{run.output_tok_s:,.0f}"]
        for load, run in speeds
    ]
    bar = f" (+- {made.error:.0%})" if made.error else ""
    return f"{_name(made)}, one replica, requests all at once{bar}\n" + table(
        ["WORKLOAD", "REQUESTS", "TOKENS", "SECONDS", "MS/TOKEN", "OUTPUT TOK/S"], rows
    )


def _errors(rows: list[tuple[LayoutPlan, tuple[str, ...]]], cluster: PlannedCluster) -> list[str]:
    """The meaning of the error bars and of `?`."""
    fit = GPU_FIT if isinstance(cluster.device, GpuModel) else HOST_FIT
    lines = []
    if any(made.error for made, _ in rows):
        lines.append(f"+-: twice the root mean square by which {fit.runs} recorded runs were missed ({fit.source})")
    if any(made.full and not made.error for made, _ in rows):
        lines.append("?: no run like it was recorded; the figure comes from rates alone")
    return lines


def _advice(each: SubjectPlan, cluster: PlannedCluster) -> list[str]:
    """What to change in the file; if the file does not fit, the refusal says it instead."""
    lines = []
    budget = each.subject.engine.max_num_tokens
    if isinstance(cluster.device, GpuModel) and budget < RECORDED_TOKENS:
        lines.append(f"hint: max_num_tokens: {USUAL_TOKENS} lets a step take whole prompts; the file has {budget}")
    own = sum(made.total_tok_s for made in each.own)
    # A gain below its own error is not reported.
    if each.best and each.refusal is None and own and each.best.total_tok_s > own * (1 + (each.best.error or 0.0)):
        gain = each.best.total_tok_s / own
        lines.append(f"hint: {settings(each.best)} gives {gain:.2f} times the tokens of the file's layout")
    return lines


def _name(made: LayoutPlan) -> str:
    return made.parallel.words


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
