"""The engine settings of a model in a deployment file, some of which may be ``auto``.

Pure values. The rule that turns ``auto`` into a value is :mod:`orchestrator.planner.automatic`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from workers.protocol.errors import ConfigError
from workers.protocol.specs import (
    Device,
    DeviceIndependentSettings,
    DType,
    EngineKind,
    EngineSpec,
    FakeOptions,
    FakeSpec,
    Parallel,
    PortableOptions,
    PortableSpec,
    TrtllmSpec,
    check_step_limits,
)
from workers.protocol.trtllm_options import TrtllmOptions

Auto: TypeAlias = Literal["auto"]
AUTO: Auto = "auto"
DeviceSetting = Literal["auto", "cpu", "cuda"]
DTypeSetting = Literal["auto", "fp32", "bf16", "fp16"]


class StepLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one step: sequences, tokens."""

    max_batch_size: int
    max_num_tokens: int


class EngineSettings(DeviceIndependentSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The engine settings of a model: the common ones, and those of each engine. A file writes them next to the model's own keys.

    ``auto`` is resolved when the deployment starts, from the device and the model.
    """

    device: DeviceSetting = AUTO
    dtype: DTypeSetting = AUTO
    max_batch_size: int | Auto = AUTO
    max_num_tokens: int | Auto = AUTO
    portable: PortableOptions = PortableOptions()
    fake: FakeOptions = FakeOptions()
    trtllm: TrtllmOptions = TrtllmOptions()

    def __post_init__(self) -> None:
        super().__post_init__()
        batch = 1 if self.max_batch_size == AUTO else self.max_batch_size
        check_step_limits(batch, batch if self.max_num_tokens == AUTO else self.max_num_tokens)

    def limits(self, usual: StepLimits) -> StepLimits:
        """The limits of a step: as given; a limit that is ``auto`` is taken from ``usual`` or follows from the other one."""
        given, tokens = self.max_batch_size, self.max_num_tokens
        if isinstance(given, int):
            batch = given
        else:
            batch = min(usual.max_batch_size, tokens) if isinstance(tokens, int) else usual.max_batch_size
        return StepLimits(max_batch_size=batch, max_num_tokens=tokens if isinstance(tokens, int) else max(usual.max_num_tokens, batch))

    def spec(self, kind: EngineKind, *, device: Device, dtype: DType, limits: StepLimits) -> EngineSpec:
        """The settings of one engine, with the values chosen for ``auto``."""
        common = {name: getattr(self, name) for name in DeviceIndependentSettings.__struct_fields__}
        common |= {"device": device, "dtype": dtype} | msgspec.structs.asdict(limits)
        match kind:
            case "portable":
                return PortableSpec(**common, options=self.portable)
            case "fake":
                return FakeSpec(**common, options=self.fake)
            case "trtllm":
                return TrtllmSpec(**common, options=self.trtllm)


class GangRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One replica as requested in a deployment file. ``path``: catalogue name, folder or file of its model."""

    name: str
    model: str
    path: str
    engine: EngineKind
    tp_size: int | Auto
    pp_size: int
    settings: EngineSettings
    cpus_per_rank: float = 1.0
    spread: bool = False
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        self.with_tp(1 if self.tp_size == AUTO else self.tp_size)
        if self.expert_parallel and self.engine == "trtllm":
            raise ConfigError(
                f"{self.name}: expert_parallel is for the portable engine",
                "TensorRT-LLM distributes experts by a number of its own",
                "use trtllm.moe_expert_parallel_size",
            )

    def with_tp(self, tp: int) -> Parallel:
        """The layout with ``tp`` ranks a stage."""
        return Parallel(tp=tp, pp=self.pp_size, expert_parallel=self.expert_parallel)

    @property
    def layout(self) -> Parallel | None:
        """The requested layout; None if ``tp_size`` is ``auto``."""
        return None if self.tp_size == AUTO else self.with_tp(self.tp_size)
