"""Seeded mutations of bytes, of protobuf messages and of frames."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from tpirt.protocol.pb import tpirt_pb2 as pb

HUGE_BYTES = (4 << 20) - 64  # within gRPC's limit
_NUMBERS = (0, 1, 2, 127, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_TEXTS = ("", "\x00", "../../../../etc/passwd", "\x1b[2J\n", "[" * 5000, "{}", "9" * 5000, "x:1")
_FIELD = pb.HelloRequest.DESCRIPTOR.fields[0]
_BITS = {_FIELD.TYPE_UINT32: 32, _FIELD.TYPE_ENUM: 31, _FIELD.TYPE_BOOL: 1}
_MOST_REPEATED = 2000
# Before message and payload: kind, dtype, step, seq, rows, columns, message and payload bytes.
_HEADER_FIELDS = (("B", 3), ("B", 4), ("Q", 8), *(("I", at) for at in (16, 20, 24, 28)), ("Q", 32))


def noise(chance: random.Random, most: int = 512) -> bytes:
    """Random bytes."""
    return chance.randbytes(chance.randint(0, most))


def mutated(chance: random.Random, data: bytes) -> bytes:
    """Change bytes: flipped, overwritten, cut, inserted, repeated; one to four times."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(changed) + 1)
        end = min(len(changed), at + chance.choice((1, 2, 4, 8, 64)))
        match chance.randrange(6):
            case 0:
                changed[at:end] = bytes(byte ^ 1 << chance.randrange(8) for byte in changed[at:end])
            case 1:
                changed[at:end] = chance.choice((b"\x00", b"\x7f", b"\xff")) * (end - at)
            case 2:
                del changed[at:]
            case 3:
                del changed[at:end]
            case 4:
                changed[at:at] = noise(chance, 64)
            case 5:
                changed[at:at] = changed[at:end] * chance.randint(1, 50)
    return bytes(changed)


def mutated_message(chance: random.Random, message: Any) -> bytes:
    """Change a field of a protobuf message or of one within it, add unknown ones, or its bytes."""
    changed = type(message)()
    changed.CopyFrom(message)
    for _ in range(chance.choice((1, 1, 3))):
        _change_field(chance, changed)
    data: bytes = changed.SerializeToString()
    match chance.randrange(4):
        case 0:
            return mutated(chance, data)
        case 1:
            return data + _unknown_field(chance)
        case _:
            return data


def bodies() -> list[pb.Message]:
    """A message of every kind that sessions and links have."""
    found = []
    for member in pb.Message.DESCRIPTOR.fields:
        message = pb.Message()
        getattr(message, member.name).SetInParent()
        found.append(message)
    return found


def mutated_frame(chance: random.Random, frame: bytes, message: Any = None) -> bytes:
    """Change a frame: a number in its header, its message, or any bytes of it."""
    head, rest = bytearray(frame[:64]), frame[64:]
    if message is not None and chance.random() < 0.6:
        body = mutated_message(chance, message)
        struct.pack_into("<I", head, 28, len(body))
        size = struct.unpack_from("<I", frame, 28)[0]
        payload = rest[size + -size % 64 :]
        return bytes(head) + body + bytes(-len(body) % 64) + payload
    if chance.random() < 0.6:
        form, at = chance.choice(_HEADER_FIELDS)
        value = chance.choice((*_NUMBERS, chance.randrange(8))) % 256 ** struct.calcsize(form)
        struct.pack_into(f"<{form}", head, at, value)
        return bytes(head) + rest
    return mutated(chance, frame)


def huge_orders() -> list[str]:
    """JSON as large as a call may bring, whose values take as much memory as possible."""
    count = HUGE_BYTES // 3
    return [
        "[" + "[]," * (count - 1) + "[]]",
        "[" + "{}," * (count - 1) + "{}]",
        '{"a":' + "[" * (HUGE_BYTES - 10),
        '{"digests":"' + "0" * (HUGE_BYTES - 20) + '"}',
        "{" + ",".join(f'"{number}":[]' for number in range(HUGE_BYTES // 13)) + "}",
    ]


def _change_field(chance: random.Random, message: Any) -> None:
    member = chance.choice(message.DESCRIPTOR.fields)
    within = [m for m, _ in message.ListFields() if m.message_type is not None]
    if within and chance.random() < 0.8:
        member = chance.choice(within)
    value = getattr(message, member.name)
    if member.message_type is not None and not member.is_repeated:
        value.SetInParent()
        if value.DESCRIPTOR.fields:
            _change_field(chance, value)
    elif member.message_type is not None:
        if value and chance.random() < 0.7:
            _change_field(chance, chance.choice(value))
        else:
            _repeat(chance, value)
    elif member.is_repeated:
        value.extend(_value(chance, member) for _ in range(_some(chance)))
    else:
        setattr(message, member.name, _value(chance, member))


def _repeat(chance: random.Random, values: Any) -> None:
    template = chance.choice(values) if values else None
    for _ in range(_some(chance)):
        added = values.add()
        if template is not None:
            added.CopyFrom(template)


def _some(chance: random.Random) -> int:
    return chance.choice((1, 2, 50, chance.randint(1, _MOST_REPEATED)))


def _value(chance: random.Random, member: Any) -> Any:
    if member.type == member.TYPE_STRING:
        return chance.choice(_TEXTS)
    if member.type == member.TYPE_BYTES:
        return noise(chance)
    if member.type == member.TYPE_DOUBLE:
        return chance.choice((0.0, -1.0, 1e308, float("inf"), float("nan")))
    bits = _BITS.get(member.type, 64)
    return chance.choice((*_NUMBERS, chance.randrange(16))) % 2**bits


def _unknown_field(chance: random.Random) -> bytes:
    """A field of 1000 and above: a number, or bytes whose length may be a lie."""
    tag = _varint((chance.randint(1000, 2000) << 3) | 2)
    data = noise(chance, 64)
    return tag + _varint(chance.choice((len(data), 2**31 - 1, 2**63))) + data


def _varint(number: int) -> bytes:
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes((*data, number))


def some_of(chance: random.Random, corpus: Sequence[bytes], most: int) -> Iterable[bytes]:
    """Up to ``most`` messages: valid ones, changed ones, and noise."""
    for _ in range(chance.randint(1, most)):
        data = chance.choice(corpus)
        yield chance.choice((data, mutated(chance, data), mutated(chance, data), noise(chance)))
