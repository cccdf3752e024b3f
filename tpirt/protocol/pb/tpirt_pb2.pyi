from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CommDtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMM_DTYPE_UNSPECIFIED: _ClassVar[CommDtype]
    FLOAT32: _ClassVar[CommDtype]
    BFLOAT16: _ClassVar[CommDtype]
    INT8: _ClassVar[CommDtype]

class Algorithm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ALGORITHM_UNSPECIFIED: _ClassVar[Algorithm]
    STAR: _ClassVar[Algorithm]
    ONE_SHOT: _ClassVar[Algorithm]
    TWO_SHOT: _ClassVar[Algorithm]
COMM_DTYPE_UNSPECIFIED: CommDtype
FLOAT32: CommDtype
BFLOAT16: CommDtype
INT8: CommDtype
ALGORITHM_UNSPECIFIED: Algorithm
STAR: Algorithm
ONE_SHOT: Algorithm
TWO_SHOT: Algorithm

class Bytes(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("protocol_version", "tpirt_version", "master")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TPIRT_VERSION_FIELD_NUMBER: _ClassVar[int]
    MASTER_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    tpirt_version: str
    master: int
    def __init__(self, protocol_version: _Optional[int] = ..., tpirt_version: _Optional[str] = ..., master: _Optional[int] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("protocol_version", "tpirt_version", "host_name", "host_id", "memory_bytes", "available_bytes", "base_bytes", "threads", "cores", "bfloat16", "busy", "process", "busy_with", "busy_s")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TPIRT_VERSION_FIELD_NUMBER: _ClassVar[int]
    HOST_NAME_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BASE_BYTES_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    BFLOAT16_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    BUSY_WITH_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    tpirt_version: str
    host_name: str
    host_id: str
    memory_bytes: int
    available_bytes: int
    base_bytes: int
    threads: int
    cores: int
    bfloat16: bool
    busy: bool
    process: int
    busy_with: str
    busy_s: int
    def __init__(self, protocol_version: _Optional[int] = ..., tpirt_version: _Optional[str] = ..., host_name: _Optional[str] = ..., host_id: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., available_bytes: _Optional[int] = ..., base_bytes: _Optional[int] = ..., threads: _Optional[int] = ..., cores: _Optional[int] = ..., bfloat16: _Optional[bool] = ..., busy: _Optional[bool] = ..., process: _Optional[int] = ..., busy_with: _Optional[str] = ..., busy_s: _Optional[int] = ...) -> None: ...

class InventoryRequest(_message.Message):
    __slots__ = ("slice_id", "order")
    SLICE_ID_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    slice_id: str
    order: str
    def __init__(self, slice_id: _Optional[str] = ..., order: _Optional[str] = ...) -> None: ...

class InventoryReply(_message.Message):
    __slots__ = ("whole", "held")
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    whole: bool
    held: bytes
    def __init__(self, whole: _Optional[bool] = ..., held: _Optional[bytes] = ...) -> None: ...

class UnitChunk(_message.Message):
    __slots__ = ("order", "unit", "offset", "crc32", "data")
    ORDER_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    order: str
    unit: int
    offset: int
    crc32: int
    data: bytes
    def __init__(self, order: _Optional[str] = ..., unit: _Optional[int] = ..., offset: _Optional[int] = ..., crc32: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutUnitsReply(_message.Message):
    __slots__ = ("bytes_written",)
    BYTES_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    bytes_written: int
    def __init__(self, bytes_written: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("certificate",)
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    def __init__(self, certificate: _Optional[bytes] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    def __init__(self, request: _Optional[bytes] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("disk_free_bytes", "load", "models", "last_error", "last_error_s")
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_S_FIELD_NUMBER: _ClassVar[int]
    disk_free_bytes: int
    load: float
    models: _containers.RepeatedCompositeFieldContainer[StoredModel]
    last_error: str
    last_error_s: int
    def __init__(self, disk_free_bytes: _Optional[int] = ..., load: _Optional[float] = ..., models: _Optional[_Iterable[_Union[StoredModel, _Mapping]]] = ..., last_error: _Optional[str] = ..., last_error_s: _Optional[int] = ...) -> None: ...

class StoredModel(_message.Message):
    __slots__ = ("name", "slices", "bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    slices: int
    bytes: int
    def __init__(self, name: _Optional[str] = ..., slices: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("setup", "loading", "ready", "step", "abort", "step_ended", "failure", "free_slot", "stats_request", "stats", "clock_request", "clock", "trace_request", "trace", "join_link", "joined", "probe", "measure_link", "link_quality", "spill_slot", "restore_slot", "drop_spilled", "done", "leaving")
    SETUP_FIELD_NUMBER: _ClassVar[int]
    LOADING_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    STEP_ENDED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    FREE_SLOT_FIELD_NUMBER: _ClassVar[int]
    STATS_REQUEST_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    CLOCK_REQUEST_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    TRACE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    JOIN_LINK_FIELD_NUMBER: _ClassVar[int]
    JOINED_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    MEASURE_LINK_FIELD_NUMBER: _ClassVar[int]
    LINK_QUALITY_FIELD_NUMBER: _ClassVar[int]
    SPILL_SLOT_FIELD_NUMBER: _ClassVar[int]
    RESTORE_SLOT_FIELD_NUMBER: _ClassVar[int]
    DROP_SPILLED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    setup: Setup
    loading: Loading
    ready: Ready
    step: Step
    abort: Abort
    step_ended: StepEnded
    failure: Failure
    free_slot: FreeSlot
    stats_request: StatsRequest
    stats: Stats
    clock_request: ClockRequest
    clock: Clock
    trace_request: TraceRequest
    trace: Trace
    join_link: JoinLink
    joined: Joined
    probe: Probe
    measure_link: MeasureLink
    link_quality: LinkQuality
    spill_slot: SpillSlot
    restore_slot: RestoreSlot
    drop_spilled: DropSpilled
    done: Done
    leaving: Leaving
    def __init__(self, setup: _Optional[_Union[Setup, _Mapping]] = ..., loading: _Optional[_Union[Loading, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., step_ended: _Optional[_Union[StepEnded, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., free_slot: _Optional[_Union[FreeSlot, _Mapping]] = ..., stats_request: _Optional[_Union[StatsRequest, _Mapping]] = ..., stats: _Optional[_Union[Stats, _Mapping]] = ..., clock_request: _Optional[_Union[ClockRequest, _Mapping]] = ..., clock: _Optional[_Union[Clock, _Mapping]] = ..., trace_request: _Optional[_Union[TraceRequest, _Mapping]] = ..., trace: _Optional[_Union[Trace, _Mapping]] = ..., join_link: _Optional[_Union[JoinLink, _Mapping]] = ..., joined: _Optional[_Union[Joined, _Mapping]] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ..., measure_link: _Optional[_Union[MeasureLink, _Mapping]] = ..., link_quality: _Optional[_Union[LinkQuality, _Mapping]] = ..., spill_slot: _Optional[_Union[SpillSlot, _Mapping]] = ..., restore_slot: _Optional[_Union[RestoreSlot, _Mapping]] = ..., drop_spilled: _Optional[_Union[DropSpilled, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ...) -> None: ...

class Setup(_message.Message):
    __slots__ = ("protocol_version", "model_fingerprint", "model_config", "slice_id", "rank", "world_size", "window_blocks", "memory_bytes", "chunk_tokens", "timeout_ms", "trace_spans", "session", "addresses", "master", "identities", "kv_bits", "host_name")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_CONFIG_FIELD_NUMBER: _ClassVar[int]
    SLICE_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TRACE_SPANS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    MASTER_FIELD_NUMBER: _ClassVar[int]
    IDENTITIES_FIELD_NUMBER: _ClassVar[int]
    KV_BITS_FIELD_NUMBER: _ClassVar[int]
    HOST_NAME_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model_fingerprint: str
    model_config: str
    slice_id: str
    rank: int
    world_size: int
    window_blocks: int
    memory_bytes: int
    chunk_tokens: int
    timeout_ms: int
    trace_spans: int
    session: int
    addresses: _containers.RepeatedScalarFieldContainer[str]
    master: int
    identities: _containers.RepeatedScalarFieldContainer[str]
    kv_bits: int
    host_name: str
    def __init__(self, protocol_version: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., model_config: _Optional[str] = ..., slice_id: _Optional[str] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., window_blocks: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., chunk_tokens: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., trace_spans: _Optional[int] = ..., session: _Optional[int] = ..., addresses: _Optional[_Iterable[str]] = ..., master: _Optional[int] = ..., identities: _Optional[_Iterable[str]] = ..., kv_bits: _Optional[int] = ..., host_name: _Optional[str] = ...) -> None: ...

class Loading(_message.Message):
    __slots__ = ("done_bytes", "total_bytes")
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    done_bytes: int
    total_bytes: int
    def __init__(self, done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("weights_bytes", "resident_bytes", "links")
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    weights_bytes: int
    resident_bytes: int
    links: _containers.RepeatedCompositeFieldContainer[LinkState]
    def __init__(self, weights_bytes: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., links: _Optional[_Iterable[_Union[LinkState, _Mapping]]] = ...) -> None: ...

class LinkState(_message.Message):
    __slots__ = ("rank", "carrier", "reason", "seal")
    RANK_FIELD_NUMBER: _ClassVar[int]
    CARRIER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    rank: int
    carrier: str
    reason: str
    seal: str
    def __init__(self, rank: _Optional[int] = ..., carrier: _Optional[str] = ..., reason: _Optional[str] = ..., seal: _Optional[str] = ...) -> None: ...

class JoinLink(_message.Message):
    __slots__ = ("session", "rank")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    session: int
    rank: int
    def __init__(self, session: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class Joined(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Step(_message.Message):
    __slots__ = ("segments", "prefill", "collective")
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_FIELD_NUMBER: _ClassVar[int]
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    prefill: bool
    collective: Collective
    def __init__(self, segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., prefill: _Optional[bool] = ..., collective: _Optional[_Union[Collective, _Mapping]] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("slot", "position", "tokens", "num_logits", "rope_length", "source", "parents", "keep", "prompt")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGITS_FIELD_NUMBER: _ClassVar[int]
    ROPE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    slot: int
    position: int
    tokens: int
    num_logits: int
    rope_length: int
    source: int
    parents: _containers.RepeatedScalarFieldContainer[int]
    keep: _containers.RepeatedScalarFieldContainer[int]
    prompt: bool
    def __init__(self, slot: _Optional[int] = ..., position: _Optional[int] = ..., tokens: _Optional[int] = ..., num_logits: _Optional[int] = ..., rope_length: _Optional[int] = ..., source: _Optional[int] = ..., parents: _Optional[_Iterable[int]] = ..., keep: _Optional[_Iterable[int]] = ..., prompt: _Optional[bool] = ...) -> None: ...

class Collective(_message.Message):
    __slots__ = ("algorithm", "comm_dtype", "micro_batches")
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    COMM_DTYPE_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    algorithm: Algorithm
    comm_dtype: CommDtype
    micro_batches: bool
    def __init__(self, algorithm: _Optional[_Union[Algorithm, str]] = ..., comm_dtype: _Optional[_Union[CommDtype, str]] = ..., micro_batches: _Optional[bool] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StepEnded(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("step", "kind", "message", "lost_rank")
    STEP_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LOST_RANK_FIELD_NUMBER: _ClassVar[int]
    step: int
    kind: str
    message: str
    lost_rank: int
    def __init__(self, step: _Optional[int] = ..., kind: _Optional[str] = ..., message: _Optional[str] = ..., lost_rank: _Optional[int] = ...) -> None: ...

class FreeSlot(_message.Message):
    __slots__ = ("slot",)
    SLOT_FIELD_NUMBER: _ClassVar[int]
    slot: int
    def __init__(self, slot: _Optional[int] = ...) -> None: ...

class SpillSlot(_message.Message):
    __slots__ = ("slot", "handle", "tokens")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    handle: int
    tokens: int
    def __init__(self, slot: _Optional[int] = ..., handle: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class RestoreSlot(_message.Message):
    __slots__ = ("slot", "handle")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    slot: int
    handle: int
    def __init__(self, slot: _Optional[int] = ..., handle: _Optional[int] = ...) -> None: ...

class DropSpilled(_message.Message):
    __slots__ = ("handles",)
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    handles: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, handles: _Optional[_Iterable[int]] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ("since_step",)
    SINCE_STEP_FIELD_NUMBER: _ClassVar[int]
    since_step: int
    def __init__(self, since_step: _Optional[int] = ...) -> None: ...

class Stats(_message.Message):
    __slots__ = ("rank", "peak_rss_bytes", "weights_bytes", "bytes_sent", "bytes_received", "bytes_read", "io_ms", "compute_ms", "comm_ms", "read_ms", "steps")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PEAK_RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    IO_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    COMM_MS_FIELD_NUMBER: _ClassVar[int]
    READ_MS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    peak_rss_bytes: int
    weights_bytes: int
    bytes_sent: int
    bytes_received: int
    bytes_read: int
    io_ms: float
    compute_ms: float
    comm_ms: float
    read_ms: float
    steps: _containers.RepeatedCompositeFieldContainer[StepTimes]
    def __init__(self, rank: _Optional[int] = ..., peak_rss_bytes: _Optional[int] = ..., weights_bytes: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ..., bytes_read: _Optional[int] = ..., io_ms: _Optional[float] = ..., compute_ms: _Optional[float] = ..., comm_ms: _Optional[float] = ..., read_ms: _Optional[float] = ..., steps: _Optional[_Iterable[_Union[StepTimes, _Mapping]]] = ...) -> None: ...

class StepTimes(_message.Message):
    __slots__ = ("step", "tokens", "prefill", "total_ms", "compute_ms", "io_ms", "comm_ms", "head_compute_ms", "head_io_ms")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    IO_MS_FIELD_NUMBER: _ClassVar[int]
    COMM_MS_FIELD_NUMBER: _ClassVar[int]
    HEAD_COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    HEAD_IO_MS_FIELD_NUMBER: _ClassVar[int]
    step: int
    tokens: int
    prefill: bool
    total_ms: float
    compute_ms: float
    io_ms: float
    comm_ms: float
    head_compute_ms: float
    head_io_ms: float
    def __init__(self, step: _Optional[int] = ..., tokens: _Optional[int] = ..., prefill: _Optional[bool] = ..., total_ms: _Optional[float] = ..., compute_ms: _Optional[float] = ..., io_ms: _Optional[float] = ..., comm_ms: _Optional[float] = ..., head_compute_ms: _Optional[float] = ..., head_io_ms: _Optional[float] = ...) -> None: ...

class ClockRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Clock(_message.Message):
    __slots__ = ("now_ns",)
    NOW_NS_FIELD_NUMBER: _ClassVar[int]
    now_ns: int
    def __init__(self, now_ns: _Optional[int] = ...) -> None: ...

class TraceRequest(_message.Message):
    __slots__ = ("lane",)
    LANE_FIELD_NUMBER: _ClassVar[int]
    lane: str
    def __init__(self, lane: _Optional[str] = ...) -> None: ...

class Trace(_message.Message):
    __slots__ = ("lane", "names", "dropped")
    LANE_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    lane: str
    names: _containers.RepeatedScalarFieldContainer[str]
    dropped: int
    def __init__(self, lane: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ..., dropped: _Optional[int] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MeasureLink(_message.Message):
    __slots__ = ("rank",)
    RANK_FIELD_NUMBER: _ClassVar[int]
    rank: int
    def __init__(self, rank: _Optional[int] = ...) -> None: ...

class LinkQuality(_message.Message):
    __slots__ = ("latency_s", "bytes_per_s")
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    latency_s: float
    bytes_per_s: float
    def __init__(self, latency_s: _Optional[float] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...
