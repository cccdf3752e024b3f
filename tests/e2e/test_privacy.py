"""What leaves the master: hidden states and sizes; no text, no token id, nothing of the user."""

from __future__ import annotations

import ast
import json
import re
import struct
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import pytest
from google.protobuf.descriptor import FieldDescriptor
from safetensors.torch import load_file

import tpirt
from tests.support.tap import Tap
from tpirt.cluster.worker import Worker
from tpirt.config import ModelConfig
from tpirt.engine import Engine, EngineOptions
from tpirt.protocol.messages import Setup, decode, encode
from tpirt.protocol.pb import tpirt_pb2 as pb
from tpirt.testing.cluster import MemoryPeerClient
from tpirt.testing.faults import frame_kind
from tpirt.testing.models import make_model
from tpirt.testing.processes import (
    PeerProcess,
    killed_at_exit,
    run_cli,
    run_python,
    start_python,
)
from tpirt.transport.base import Channel
from tpirt.transport.frame import Frame, Header
from tpirt.types import Message, SamplingParams
from tpirt.weights.store import SliceStore

SECRET = "Quokkas whisper 7319 zeppelin secrets to Grandmother Ångström."
STOP = "Xylophone-stop-9183"
TEMPERATURE, TOP_P, SEED = 0.7310585786, 0.9172635, 987_654_321_012
RUN = 8  # so many ids in a row are no accident


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


# -- looking for it --------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def spellings_of_text(text: str) -> Iterator[bytes]:
    for encoding in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "latin-1"):
        with suppress(UnicodeEncodeError):
            yield text.encode(encoding)
    yield text.encode("unicode_escape")
    yield text.encode().hex().encode()


def spellings_of_ids(ids: list[int]) -> Iterator[bytes]:
    yield b"".join(map(varint, ids))
    yield b"".join(varint(i << 1) for i in ids)  # sint32, sint64
    for kind in ("<H", ">H", "<i", ">i", "<q", ">q", "<f", ">f", "<d"):
        yield b"".join(struct.pack(kind, i) for i in ids)
    for separator in (",", ", ", " ", "\n"):
        yield separator.join(map(str, ids)).encode()


def spellings_of_number(value: float) -> Iterator[bytes]:
    yield str(value).encode()
    yield struct.pack("<d", value)
    if isinstance(value, int):
        yield varint(value)
        yield struct.pack("<q", value)
    else:
        yield struct.pack("<f", value)


def words(text: str) -> list[str]:
    """The text itself and all of it that is long enough not to occur by accident."""
    return [text, *(word for word in text.split() if len(word) > 6)]


def find(data: bytes, needles: Iterable[bytes]) -> list[bytes]:
    return [needle for needle in needles if len(needle) > 5 and needle in data]


def leaks(
    data: bytes, texts: Iterable[str], ids: list[int], numbers: Iterable[float]
) -> list[bytes]:
    found: list[bytes] = []
    for text in texts:
        for word in words(text):
            found += find(data, spellings_of_text(word))
    for start in range(0, len(ids) - RUN + 1, RUN // 2):
        found += find(data, spellings_of_ids(ids[start : start + RUN]))
    for number in numbers:
        found += find(data, spellings_of_number(number))
    return found


def test_search_finds_what_is_there() -> None:
    ids = [300, 5, 17, 200, 65, 65, 90, 1000, 7, 260, 5, 12]
    for place in (*spellings_of_ids(ids[1:]), *spellings_of_text(SECRET)):
        assert leaks(b"\0\xff" + place + b"\1", [SECRET], ids, []), place
    for number in (TEMPERATURE, SEED):
        assert leaks(b"\0" + struct.pack("<d", number), [], [], [number])
    assert not leaks(bytes(range(256)) * 4, [SECRET], ids, [TEMPERATURE, SEED])


# -- on the wire -----------------------------------------------------------------------------


def secrets_of(model: Path) -> list[str]:
    """Texts of the tokenizer and the template, which stay on the master as well."""
    return [
        "<|im_start|>",
        "<|endoftext|>",
        "add_generation_prompt",
        "PreTrainedTokenizer",
        "ByteLevel",
    ]


def test_no_byte_between_two_processes_tells_of_the_prompt_or_the_answer(
    model: Path, tmp_path: Path
) -> None:
    prompt = tmp_path / "diary-of-Ottoline.txt"
    prompt.write_text(SECRET, encoding="utf-8")
    with PeerProcess(tmp_path / "peer") as peer:
        tap = Tap(peer.address)
        try:
            done = run_cli(
                *("generate", "--model", str(model), "--peers", tap.address, "--json", "--quiet"),
                *("--prompt-file", str(prompt), "--chat", "--max-tokens", "48", "--threads", "1"),
                *("--temperature", str(TEMPERATURE), "--top-p", str(TOP_P), "--seed", str(SEED)),
                *("--stop", STOP, "--dtype", "float32", "--store", str(tmp_path / "store")),
            )
        finally:
            tap.close()
        log = peer.log
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    there, back = bytes(tap.there), bytes(tap.back)
    # The tap has seen it all: the slice, the setup, the hidden states of every token.
    assert tap.taken == 3  # where it is reached, gRPC, and the connection for frames
    gate = load_file(model / "model.safetensors")["model.layers.2.mlp.gate_proj.weight"].float()
    rows = [row.numpy().tobytes() for row in gate[-20:]]  # some may lie across HTTP's frames
    assert sum(row in there for row in rows) > 10
    assert ModelConfig.from_dir(model).to_json().encode() in there
    tokens = len(answer["prompt_token_ids"]) + len(answer["token_ids"]) - 1
    # Of three layers, the last one's two sums are of a prompt's last token alone.
    assert min(len(there), len(back)) > tokens * 64 * 4 * 4
    ids = answer["prompt_token_ids"] + answer["token_ids"]
    texts = [SECRET, answer["text"], STOP, prompt.name, str(model.parent), *secrets_of(model)]
    numbers = (TEMPERATURE, TOP_P, SEED)
    for data in (there, back, log.encode()):
        assert leaks(data, texts, ids, numbers) == []
    kept = b"".join(path.read_bytes() for path in peer.store.rglob("*") if path.is_file())
    assert len(kept) > 100_000
    assert leaks(kept, texts, ids, numbers) == []


# -- message by message ----------------------------------------------------------------------

MESSAGES = {"Setup", "Probe", "StatsRequest"}


class Recording:
    """Keeps every frame that a master sends."""

    def __init__(self, inner: Channel, frames: list[Frame]):
        self._inner = inner
        self._frames = frames

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self._inner, name, value)

    async def send(self, frame: Frame) -> None:
        self._frames.append(Frame(frame.head, frame.message, bytes(frame.payload)))
        await self._inner.send(frame)

    def send_nowait(self, frame: Frame) -> bool:
        assert frame_kind(frame) == "heartbeat"
        assert (frame.message, frame.payload) == (b"", b"")
        return self._inner.send_nowait(frame)


class RecordingClient(MemoryPeerClient):
    """Keeps what is said outside of sessions, too."""

    def __init__(self, store: Path, frames: list[Frame], others: list[bytes]):
        super().__init__(
            Worker("w", SliceStore(store), None, 1, lambda _: None),
            master_side=lambda _, channel: Recording(channel, frames),  # type: ignore[arg-type,return-value]
        )
        self._others = others

    async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        self._others.append(request)
        return await super().call(method, request, timeout_s)

    async def upload(self, method: str, chunks: AsyncIterator[bytes], timeout_s: float) -> bytes:
        async def recorded() -> AsyncIterator[bytes]:
            async for chunk in chunks:
                self._others.append(chunk)
                yield chunk

        return await super().upload(method, recorded(), timeout_s)


async def test_no_message_tells_of_the_prompt_or_the_answer(model: Path, tmp_path: Path) -> None:
    frames: list[Frame] = []
    others: list[bytes] = []
    client = RecordingClient(tmp_path / "worker", frames, others)
    options = EngineOptions(dtype="float32", threads=1, store=tmp_path / "master", draft="none")
    async with Engine.connect(model, options, peers=[client]) as engine:
        params = SamplingParams(
            max_tokens=40, temperature=TEMPERATURE, top_p=TOP_P, seed=SEED, stop=(STOP,)
        )
        prompt = engine.encode([Message("system", STOP), Message("user", SECRET)])
        answer = await engine.complete(prompt, params)
        hidden_size = engine.config.hidden_size
    ids = prompt + answer.token_ids
    texts = [SECRET, answer.text, STOP, str(model.parent), *secrets_of(model)]
    data = b"\n".join([*(b"".join(frame.parts()) for frame in frames), *others])
    assert sum(map(len, others)) > 100_000  # the slice is among them
    assert leaks(data, texts, ids, (TEMPERATURE, TOP_P, SEED)) == []
    # A payload is hidden states and nothing else; all else is numbers that do not depend on which
    # tokens they are.
    assert {frame_kind(frame) for frame in frames} == MESSAGES | {"step", "partial"}
    for frame in frames:
        header = frame.header
        match frame_kind(frame):
            case "step":
                batch = decode(frame.message, "test")
                assert len(frame.payload) == batch.tokens * hidden_size * 4
            case "partial":
                assert frame.message == b""
                assert len(frame.payload) == header.rows * header.columns * 4
            case "Probe":
                assert not any(frame.payload)
            case _:
                assert len(frame.payload) == 0

    steps = [decode(frame.message, "test") for frame in frames if frame_kind(frame) == "step"]
    segments = [segment for step in steps for segment in step.segments]
    assert [s.tokens for s in segments] == [len(prompt)] + [1] * (len(answer.token_ids) - 1)
    assert [s.position for s in segments] == [0, *range(len(prompt), len(ids) - 1)]
    assert {(s.slot, s.num_logits, s.rope_length) for s in segments} == {(0, 1, len(prompt))}


def without_chance(frame: Frame) -> bytes:
    """All but the payload, and but what a setup draws or takes from the machine's free memory."""
    if frame_kind(frame) != "Setup":
        return frame.head + frame.message
    setup = decode(frame.message, "test")
    assert isinstance(setup, Setup)
    return encode(replace(setup, memory_bytes=0, session=0, master=0))


async def test_other_words_give_the_same_messages_but_for_hidden_states(
    model: Path, tmp_path: Path
) -> None:
    """All that is not a payload is equal for two prompts of one length."""
    seen = []
    for prompt in ([65, 66, 67, 68, 69], [200, 3, 77, 3, 9]):
        frames: list[Frame] = []
        client = RecordingClient(tmp_path / "worker", frames, [])
        async with Engine.connect(
            model,
            EngineOptions(dtype="float32", threads=1, store=tmp_path / "master"),
            peers=[client],
        ) as engine:
            await engine.complete(prompt, SamplingParams(max_tokens=6))
        seen.append(frames)
    first, second = ([without_chance(frame) for frame in frames] for frames in seen)
    assert first == second
    assert [f.payload for f in seen[0]] != [f.payload for f in seen[1]]


# -- what messages can carry at all ----------------------------------------------------------

# Every field of every message. A new one belongs here only if it cannot tell anything of a
# prompt, an answer, the tokenizer or the sampling; texts and bytes say here what is in them.
ALLOWED = {
    "Bytes": set(),
    "HelloRequest": {"protocol_version", "tpirt_version", "master"},
    "HelloReply": {
        "protocol_version",
        "tpirt_version",
        "host_name",
        "host_id",
        "memory_bytes",
        "available_bytes",
        "base_bytes",
        "threads",
        "cores",
        "bfloat16",
        "busy",
        "busy_with",
        "busy_s",
        "process",
    },
    "InventoryRequest": {"slice_id", "order"},
    "InventoryReply": {"whole", "held"},
    "UnitChunk": {"order", "unit", "offset", "crc32", "data"},
    "PutUnitsReply": {"bytes_written"},
    "Message": {
        "setup",
        "loading",
        "ready",
        "step",
        "abort",
        "step_ended",
        "failure",
        "free_slot",
        "stats_request",
        "stats",
        "clock_request",
        "clock",
        "trace_request",
        "trace",
        "join_link",
        "joined",
        "probe",
        "measure_link",
        "link_quality",
        "spill_slot",
        "restore_slot",
        "drop_spilled",
        "done",
        "leaving",
    },
    "Setup": {
        "protocol_version",
        "model_fingerprint",
        "model_config",
        "slice_id",
        "rank",
        "world_size",
        "window_blocks",
        "memory_bytes",
        "chunk_tokens",
        "timeout_ms",
        "trace_spans",
        "session",
        "kv_bits",
        "host_name",
        "addresses",
        "identities",
        "master",
    },
    "Loading": {"done_bytes", "total_bytes"},
    "Ready": {"weights_bytes", "resident_bytes", "links"},
    "LinkState": {"rank", "carrier", "reason", "seal"},
    "RenewRequest": {"certificate"},
    "RenewReply": {"request"},
    "StatusRequest": set(),
    "StatusReply": {"disk_free_bytes", "load", "models", "last_error", "last_error_s"},
    "StoredModel": {"name", "slices", "bytes"},
    "JoinLink": {"session", "rank"},
    "Joined": set(),
    "Step": {"segments", "prefill", "collective"},
    "Segment": {
        "slot",
        "position",
        "tokens",
        "num_logits",
        "rope_length",
        "source",
        "parents",
        "keep",
        "prompt",
    },
    "Collective": {"algorithm", "comm_dtype", "micro_batches"},
    "Abort": {"step"},
    "StepEnded": {"step"},
    "Failure": {"step", "kind", "message", "lost_rank"},
    "FreeSlot": {"slot"},
    "SpillSlot": {"slot", "handle", "tokens"},
    "RestoreSlot": {"slot", "handle"},
    "DropSpilled": {"handles"},
    "Done": set(),
    "Leaving": set(),
    "StatsRequest": {"since_step"},
    "Stats": {
        "rank",
        "peak_rss_bytes",
        "weights_bytes",
        "bytes_sent",
        "bytes_received",
        "bytes_read",
        "io_ms",
        "compute_ms",
        "comm_ms",
        "read_ms",
        "steps",
    },
    "StepTimes": {
        "step",
        "tokens",
        "prefill",
        "total_ms",
        "compute_ms",
        "io_ms",
        "comm_ms",
        "head_compute_ms",
        "head_io_ms",
    },
    "ClockRequest": set(),
    "Clock": {"now_ns"},
    "TraceRequest": {"lane"},
    "Trace": {"lane", "names", "dropped"},
    "Probe": set(),
    "MeasureLink": {"rank"},
    "LinkQuality": {"latency_s", "bytes_per_s"},
}
# Next to a message, a frame has numbers and a payload: hidden states, partial sums of them, zeros
# of a probe, recorded spans of a trace.
FRAME_FIELDS = {
    "kind",
    "dtype",
    "step",
    "seq",
    "rows",
    "columns",
    "message_bytes",
    "payload_bytes",
}
TEXTS = {
    "HelloRequest.tpirt_version",
    "HelloReply.tpirt_version",
    "HelloReply.host_name",  # of the worker
    "HelloReply.host_id",
    "InventoryRequest.slice_id",  # hash of model, dtype and shard
    "InventoryRequest.order",  # shapes, name of the model's folder, hashes of weights
    "InventoryReply.held",  # hashes of weights
    "UnitChunk.order",
    "UnitChunk.data",  # weights
    "Setup.model_fingerprint",  # hash
    "Setup.model_config",  # shapes and options of the model
    "Setup.slice_id",
    "Setup.addresses",  # of the other workers
    "Setup.identities",  # random numbers of the other workers
    "LinkState.carrier",  # from worker to master: tcp or grpc
    "LinkState.reason",  # from worker to master: why another one cannot be reached
    "LinkState.seal",  # from worker to master: a cipher
    "RenewRequest.certificate",  # the worker's own
    "StatusReply.last_error",  # from worker to master: why a session ended
    "StoredModel.name",  # from worker to master: of a model's folder
    "RenewReply.request",  # from worker to master: a public key
    "TraceRequest.lane",  # disk, compute, network or steps
    "Trace.lane",
    "Trace.names",  # from worker to master: blocks and collectives
    "Setup.host_name",  # of the master's machine
    "HelloReply.busy_with",  # the same, to another master
    "Failure.kind",
    "Failure.message",  # from worker to master
}


def fields() -> Iterator[tuple[str, FieldDescriptor]]:
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        assert not message.nested_types
        yield from ((message.name, field) for field in message.fields)


def test_every_field_is_on_the_allow_list() -> None:
    found: dict[str, set[str]] = {name: set() for name in pb.DESCRIPTOR.message_types_by_name}
    for message, field in fields():
        found.setdefault(message, set()).add(field.name)
    assert found == ALLOWED
    assert set(Header._fields) == FRAME_FIELDS
    assert set(pb.DESCRIPTOR.enum_types_by_name) == {"CommDtype", "Algorithm"}
    (service,) = pb.DESCRIPTOR.services_by_name.values()
    methods = {method.name for method in service.methods}
    assert methods == {"Hello", "Inventory", "PutUnits", "Renew", "Status", "Session", "Link"}


def test_every_text_field_is_on_the_allow_list() -> None:
    kinds = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
    texts = {f"{message}.{f.name}" for message, f in fields() if f.type in kinds}
    assert texts == TEXTS


def test_config_that_is_sent_has_shapes_and_options_only(model: Path) -> None:
    sent = json.loads(ModelConfig.from_dir(model).to_json())
    texts = {key for key, value in sent.items() if isinstance(value, str)}
    assert texts == {"model_type", "hidden_act", "dtype"}
    assert all("token" not in key or key == "tie_word_embeddings" for key in sent)


# -- who opens connections -------------------------------------------------------------------

# What of the standard library and of gRPC reaches a network, and asyncio's ways to it.
NETWORK = re.compile(
    r"(socket|socketserver|ssl|grpc|http|urllib|xmlrpc|ftplib|smtplib|poplib)(\.|$)"
)
OPENERS = re.compile(
    r"(open|start|create|sock)_(unix_)?(connect|connection|server|datagram_endpoint)$"
)


def uses_of_the_network(source: str) -> Iterator[str]:
    """Imports of the network, attributes of ``socket``, and calls of asyncio that open sockets."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (each.name for each in names if NETWORK.match(each.name))
            case ast.ImportFrom(module=str(module)) if NETWORK.match(module):
                yield from (f"{module}.{each.name}" for each in node.names)
            case ast.Attribute(value=ast.Name(id="socket"), attr=name):
                yield f"socket.{name}"
            case ast.Attribute(attr=name) if OPENERS.match(name):
                yield name


@pytest.mark.parametrize(
    "source",
    [
        "import grpc.aio",
        "from urllib.request import urlopen",
        "async def f():\n    await asyncio.open_connection('host', 1)",
        "loop.create_datagram_endpoint(f)",
    ],
)
def test_the_search_finds_uses_of_the_network(source: str) -> None:
    assert list(uses_of_the_network(source))


def test_no_code_beside_the_transport_uses_the_network() -> None:
    root = Path(tpirt.__file__).parent
    found = {
        (str(path.relative_to(root)), use)
        for path in root.rglob("*.py")
        if path.relative_to(root).parts[0] not in ("transport", "testing")
        for use in uses_of_the_network(path.read_text(encoding="utf-8"))
    }
    # For the host's name, which is part of a worker's id.
    assert found == {
        ("cluster/machine.py", "socket"),
        ("cluster/machine.py", "socket.gethostname"),
    }


# Writes down which module of tpirt, if any, is behind each use of a socket, then runs a command.
# asyncio's event loop uses sockets from Python, where the interpreter reports it; uvloop does not.
AUDITED = """
import sys
file = open(sys.argv[1], "a", buffering=1)

def audit(event, args):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"):
        frame = sys._getframe(1)
        while frame and not frame.f_globals.get("__name__", "").startswith("tpirt."):
            frame = frame.f_back
        file.write(f"{event} {frame and frame.f_globals['__name__']} {args[1:]}\\n")

sys.addaudithook(audit)
sys.modules["uvloop"] = None
from tpirt.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def test_only_the_transport_opens_connections(model: Path, tmp_path: Path) -> None:
    """Of a master and a worker that do all they do for an answer."""
    seen = {name: tmp_path / name for name in ("master", "worker")}
    listen = ("peer", "--listen", "127.0.0.1:0", "--store", str(tmp_path / "store"))
    with killed_at_exit(
        start_python("-c", AUDITED, str(seen["worker"]), *listen, stdout=PIPE, text=True)
    ) as worker:
        assert worker.stdout is not None
        address = worker.stdout.readline().split()[2]
        done = run_python(
            *("-c", AUDITED, str(seen["master"]), "generate", "--model", str(model), "--quiet"),
            *("--peers", address, "--prompt", SECRET, "--store", str(tmp_path / "slices")),
            text=True,
        )
    assert (done.returncode, done.stderr) == (0, "")
    uses = {
        name: [line.split()[:2] for line in file.read_text().splitlines()]
        for name, file in seen.items()
    }
    assert ["socket.connect", "tpirt.transport.reach"] in uses["master"]
    assert ["socket.bind", "tpirt.transport.address"] in uses["worker"]
    for _, module in [*uses["master"], *uses["worker"]]:
        assert module.startswith("tpirt.transport.")
