"""The options that ``trtllm-build`` may get: a subset of its own, by its own names, with the values that each may have.

Owns names, ranges and the contradictions that can be detected without a checkpoint. Not included are options that the checkpoint defines
(layout, number formats), options that no replica here could serve (KV caches that are not paged, plans without weights, debug networks),
and options whose values the published interface does not list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec

from workers.protocol.errors import ConfigError

Switch = Literal["", "enable", "disable"]
DrafterName = Literal["", "draft_tokens_external", "lookahead_decoding", "medusa", "explicit_draft_tokens", "eagle"]
PluginName = Literal["", "auto", "float16", "float32", "bfloat16", "int32", "fp8", "nvfp4"]
HELP = "trireme build --help lists the options"


def _number(text: str, least: int = 0) -> Any:
    return msgspec.Meta(ge=least, description=text)


def _text(text: str) -> Any:
    return msgspec.Meta(description=text)


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """0, False and empty = not passed: the builder's own default applies."""

    max_batch_size: Annotated[int, _number("sequences in one step", 1)] = 256
    max_num_tokens: Annotated[int, _number("tokens in one step", 1)] = 8192
    max_seq_len: Annotated[int, _number("longest prompt and answer, tokens; 0 = the model's context")] = 0
    max_input_len: Annotated[int, _number("longest prompt, tokens; 0 = max-seq-len")] = 0
    max_beam_width: Annotated[int, _number("beams; replicas use one", 1)] = 1
    opt_num_tokens: Annotated[int, _number("tokens in a step for which the engine is tuned")] = 0
    kv_cache_type: Annotated[Literal["paged"], _text("the only one that batches in flight")] = "paged"
    tokens_per_block: Annotated[Literal[16, 32, 64, 128], _text("tokens in a KV block")] = 32
    workers: Annotated[int, _number("engines built at a time, at most one a GPU", 1)] = 1
    gemm_plugin: Annotated[PluginName, _text("products by plugin; auto for fp16 and bf16 checkpoints")] = ""
    gpt_attention_plugin: Annotated[Literal["", "auto"], _text("attention by plugin")] = ""
    nccl_plugin: Annotated[Literal["", "auto"], _text("collectives by plugin")] = ""
    remove_input_padding: Annotated[Literal["", "enable"], _text("prompts packed without padding")] = ""
    context_fmha: Annotated[Switch, _text("fused attention for prompts")] = ""
    use_paged_context_fmha: Annotated[Literal["enable"], _text("needed by prefix reuse and chunked prompts")] = "enable"
    use_fp8_context_fmha: Annotated[Switch, _text("FP8 attention for prompts")] = ""
    use_fused_mlp: Annotated[Switch, _text("gate and up projection as one product")] = ""
    reduce_fusion: Annotated[Switch, _text("all-reduce fused with the norm")] = ""
    user_buffer: Annotated[Switch, _text("NCCL user buffers")] = ""
    pp_reduce_scatter: Annotated[Switch, _text("reduce-scatter between pipeline stages")] = ""
    norm_quant_fusion: Annotated[Switch, _text("norm fused with quantization")] = ""
    multiple_profiles: Annotated[Switch, _text("kernels chosen for several sizes of a step")] = ""
    logits_dtype: Annotated[Literal["", "float16", "float32"], _text("number format of the scores")] = ""
    gather_context_logits: Annotated[bool, _text("keep the scores of prompts")] = False
    gather_generation_logits: Annotated[bool, _text("keep the scores of answers")] = False
    lora_plugin: Annotated[Literal["", "auto"], _text("adapters")] = ""
    lora_dir: Annotated[str, _text("folder of an adapter")] = ""
    lora_ckpt_source: Annotated[Literal["", "hf", "nemo"], _text("format of the adapter's author")] = ""
    max_lora_rank: Annotated[int, _number("largest rank of an adapter")] = 0
    speculative_decoding_mode: Annotated[DrafterName, _text("how tokens are drafted")] = ""
    max_draft_len: Annotated[int, _number("longest draft, tokens")] = 0
    weight_streaming: Annotated[bool, _text("weights that do not fit stay in host memory")] = False
    weight_sparsity: Annotated[bool, _text("sparse kernels")] = False
    fast_build: Annotated[bool, _text("a faster build of a slower engine")] = False
    profiling_verbosity: Annotated[Literal["", "layer_names_only", "detailed", "none"], _text("names in profiles")] = ""
    log_level: Annotated[str, _text("log level of the builder")] = ""

    def __post_init__(self) -> None:
        _require(
            self.max_num_tokens >= self.max_batch_size,
            f"--max-num-tokens {self.max_num_tokens} is below --max-batch-size {self.max_batch_size}",
            "one step must be able to hold one token of every sequence",
        )
        _require(
            self.opt_num_tokens <= self.max_num_tokens,
            f"--opt-num-tokens {self.opt_num_tokens} is above --max-num-tokens {self.max_num_tokens}",
            "the engine is tuned for a number of tokens that it can hold",
        )
        _require(
            not (self.opt_num_tokens and self.multiple_profiles == "enable"),
            "--opt-num-tokens and --multiple-profiles exclude each other",
            "with several profiles the builder chooses what each is tuned for",
        )
        _require(
            bool(self.max_draft_len) == bool(self.speculative_decoding_mode),
            "--max-draft-len and --speculative-decoding-mode go together",
            "a draft has a length, and a length is that of a draft",
        )


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One option, for help and parsing. ``choices``: its possible values where it is given; () for a number, a text or a flag."""

    name: str
    kind: type
    default: Any
    choices: tuple[Any, ...]
    text: str

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


def options() -> Iterator[Option]:
    """Every option, in the order of the struct."""
    hints = get_type_hints(BuildOptions, include_extras=True)
    for field in msgspec.structs.fields(BuildOptions):
        kind, meta = get_args(hints[field.name])
        choices = tuple(value for value in get_args(kind) if value != "")
        plain = type(choices[0]) if choices else kind
        yield Option(name=field.name, kind=plain, default=field.default, choices=choices, text=meta.description)


def from_flags(given: Mapping[str, Any]) -> BuildOptions:
    """Options by name; None = not given. Raises :class:`ConfigError` naming the flag."""
    chosen = {name: value for name, value in given.items() if value is not None}
    for option in options():
        value = chosen.get(option.name)
        if value is not None and option.choices and value not in option.choices:
            raise ConfigError(f"{option.flag} {value} is not possible", option.text, f"use {', '.join(map(str, option.choices))}")
    try:
        return msgspec.convert(chosen, BuildOptions)
    except msgspec.ValidationError as error:
        why, _, where = str(error).partition(" - at `$.")
        name = where.rstrip("`")
        raise ConfigError(f"--{name.replace('_', '-')} {chosen.get(name, '')} is not possible", why, HELP) from None


def _require(ok: bool, what: str, why: str) -> None:
    if not ok:
        raise ConfigError(what, why, HELP)
