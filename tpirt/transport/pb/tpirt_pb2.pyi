from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    INT8: _ClassVar[DType]

class Algorithm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAR: _ClassVar[Algorithm]
    ONE_SHOT: _ClassVar[Algorithm]
    TWO_SHOT: _ClassVar[Algorithm]
DTYPE_UNSPECIFIED: DType
FLOAT32: DType
BFLOAT16: DType
INT8: DType
STAR: Algorithm
ONE_SHOT: Algorithm
TWO_SHOT: Algorithm

class HelloRequest(_message.Message):
    __slots__ = ("protocol_version", "tpirt_version", "slice_id")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TPIRT_VERSION_FIELD_NUMBER: _ClassVar[int]
    SLICE_ID_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    tpirt_version: str
    slice_id: str
    def __init__(self, protocol_version: _Optional[int] = ..., tpirt_version: _Optional[str] = ..., slice_id: _Optional[str] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("protocol_version", "tpirt_version", "peer_id", "host_id", "memory_bytes", "available_bytes", "threads", "bfloat16", "busy", "has_slice", "cores", "int4_layout")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TPIRT_VERSION_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    BFLOAT16_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    HAS_SLICE_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    INT4_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    tpirt_version: str
    peer_id: str
    host_id: str
    memory_bytes: int
    available_bytes: int
    threads: int
    bfloat16: bool
    busy: bool
    has_slice: bool
    cores: int
    int4_layout: str
    def __init__(self, protocol_version: _Optional[int] = ..., tpirt_version: _Optional[str] = ..., peer_id: _Optional[str] = ..., host_id: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., available_bytes: _Optional[int] = ..., threads: _Optional[int] = ..., bfloat16: _Optional[bool] = ..., busy: _Optional[bool] = ..., has_slice: _Optional[bool] = ..., cores: _Optional[int] = ..., int4_layout: _Optional[str] = ...) -> None: ...

class SliceChunk(_message.Message):
    __slots__ = ("manifest", "chunk")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    manifest: str
    chunk: BlockChunk
    def __init__(self, manifest: _Optional[str] = ..., chunk: _Optional[_Union[BlockChunk, _Mapping]] = ...) -> None: ...

class BlockChunk(_message.Message):
    __slots__ = ("block", "offset", "crc32", "data")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    block: int
    offset: int
    crc32: int
    data: bytes
    def __init__(self, block: _Optional[int] = ..., offset: _Optional[int] = ..., crc32: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutSliceReply(_message.Message):
    __slots__ = ("bytes_written", "held")
    BYTES_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    bytes_written: int
    held: bytes
    def __init__(self, bytes_written: _Optional[int] = ..., held: _Optional[bytes] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: FrameHeader
    payload: bytes
    def __init__(self, header: _Optional[_Union[FrameHeader, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class FrameHeader(_message.Message):
    __slots__ = ("setup", "loading", "ready", "step", "partial", "reduced", "abort", "stats_request", "stats", "error", "clock_request", "clock", "trace_request", "trace", "link", "probe", "measure_links", "link_states")
    SETUP_FIELD_NUMBER: _ClassVar[int]
    LOADING_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    REDUCED_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    STATS_REQUEST_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CLOCK_REQUEST_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    TRACE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    MEASURE_LINKS_FIELD_NUMBER: _ClassVar[int]
    LINK_STATES_FIELD_NUMBER: _ClassVar[int]
    setup: Setup
    loading: Loading
    ready: Ready
    step: Step
    partial: Tensor
    reduced: Tensor
    abort: Abort
    stats_request: StatsRequest
    stats: Stats
    error: Error
    clock_request: ClockRequest
    clock: Clock
    trace_request: TraceRequest
    trace: Trace
    link: Link
    probe: Probe
    measure_links: MeasureLinks
    link_states: LinkStates
    def __init__(self, setup: _Optional[_Union[Setup, _Mapping]] = ..., loading: _Optional[_Union[Loading, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., partial: _Optional[_Union[Tensor, _Mapping]] = ..., reduced: _Optional[_Union[Tensor, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., stats_request: _Optional[_Union[StatsRequest, _Mapping]] = ..., stats: _Optional[_Union[Stats, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., clock_request: _Optional[_Union[ClockRequest, _Mapping]] = ..., clock: _Optional[_Union[Clock, _Mapping]] = ..., trace_request: _Optional[_Union[TraceRequest, _Mapping]] = ..., trace: _Optional[_Union[Trace, _Mapping]] = ..., link: _Optional[_Union[Link, _Mapping]] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ..., measure_links: _Optional[_Union[MeasureLinks, _Mapping]] = ..., link_states: _Optional[_Union[LinkStates, _Mapping]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("step", "seq", "dtype", "shape")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    step: int
    seq: int
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., seq: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Setup(_message.Message):
    __slots__ = ("protocol_version", "model_fingerprint", "model_config", "slice_id", "rank", "world_size", "window_blocks", "memory_bytes", "chunk_tokens", "timeout_ms", "trace_spans", "session", "addresses")
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
    def __init__(self, protocol_version: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., model_config: _Optional[str] = ..., slice_id: _Optional[str] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., window_blocks: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., chunk_tokens: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., trace_spans: _Optional[int] = ..., session: _Optional[int] = ..., addresses: _Optional[_Iterable[str]] = ...) -> None: ...

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

class Link(_message.Message):
    __slots__ = ("session", "rank")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    session: int
    rank: int
    def __init__(self, session: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("number", "last")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    number: int
    last: bool
    def __init__(self, number: _Optional[int] = ..., last: _Optional[bool] = ...) -> None: ...

class MeasureLinks(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LinkStates(_message.Message):
    __slots__ = ("links",)
    LINKS_FIELD_NUMBER: _ClassVar[int]
    links: _containers.RepeatedCompositeFieldContainer[LinkState]
    def __init__(self, links: _Optional[_Iterable[_Union[LinkState, _Mapping]]] = ...) -> None: ...

class LinkState(_message.Message):
    __slots__ = ("rank", "latency_s", "bytes_per_s", "failure", "via")
    RANK_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    VIA_FIELD_NUMBER: _ClassVar[int]
    rank: int
    latency_s: float
    bytes_per_s: float
    failure: str
    via: str
    def __init__(self, rank: _Optional[int] = ..., latency_s: _Optional[float] = ..., bytes_per_s: _Optional[float] = ..., failure: _Optional[str] = ..., via: _Optional[str] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step", "start", "tokens", "rope_length", "prefill", "algorithm", "comm_dtype", "halves", "outputs", "dtype")
    STEP_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROPE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    COMM_DTYPE_FIELD_NUMBER: _ClassVar[int]
    HALVES_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    step: int
    start: int
    tokens: int
    rope_length: int
    prefill: bool
    algorithm: Algorithm
    comm_dtype: DType
    halves: bool
    outputs: int
    dtype: DType
    def __init__(self, step: _Optional[int] = ..., start: _Optional[int] = ..., tokens: _Optional[int] = ..., rope_length: _Optional[int] = ..., prefill: _Optional[bool] = ..., algorithm: _Optional[_Union[Algorithm, str]] = ..., comm_dtype: _Optional[_Union[DType, str]] = ..., halves: _Optional[bool] = ..., outputs: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ("reset",)
    RESET_FIELD_NUMBER: _ClassVar[int]
    reset: bool
    def __init__(self, reset: _Optional[bool] = ...) -> None: ...

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
    __slots__ = ()
    def __init__(self) -> None: ...

class Trace(_message.Message):
    __slots__ = ("lane", "names", "dropped", "last")
    LANE_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    lane: str
    names: _containers.RepeatedScalarFieldContainer[str]
    dropped: int
    last: bool
    def __init__(self, lane: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ..., dropped: _Optional[int] = ..., last: _Optional[bool] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("step", "kind", "message")
    STEP_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    step: int
    kind: str
    message: str
    def __init__(self, step: _Optional[int] = ..., kind: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
