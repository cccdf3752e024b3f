"""The messages of joining: whatever comes is read, or refused with an IdentityError."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpirt.errors import IdentityError
from tpirt.identity.join import (
    DeviceExchange,
    JoinReply,
    JoinRequest,
    MasterExchange,
    WrongCodeError,
    new_code,
    read_code,
)

CODE = b"48210937"
REQUEST = JoinRequest("kitchen", 50_051, "request")
REPLY = JoinReply("certificate", "authority", "home")

anything = st.binary(max_size=200)


def changed(message: bytes, data: st.DataObject) -> bytes:
    """A message with one bit flipped, cut off, or with something appended."""
    how = data.draw(st.sampled_from(["flip", "cut", "append"]))
    if how == "flip":
        at = data.draw(st.integers(0, 8 * len(message) - 1))
        return message[: at // 8] + bytes([message[at // 8] ^ 1 << at % 8]) + message[at // 8 + 1 :]
    if how == "cut":
        return message[: data.draw(st.integers(0, len(message) - 1))]
    return message + data.draw(st.binary(min_size=1, max_size=20))


def test_both_sides_come_to_an_agreement() -> None:
    master, device = MasterExchange(CODE), DeviceExchange(CODE)
    wire = [device.hello()]
    wire.append(master.answer(wire[-1]))
    wire.append(device.request(wire[-1], REQUEST))
    assert master.confirmed(wire[-1]) == REQUEST
    wire.append(master.reply(REPLY))
    assert device.accept(wire[-1]) == REPLY
    wire.append(device.kept())
    assert master.kept(wire[-1])
    seen = b"".join(wire)
    for secret in (CODE, b"kitchen", b"certificate", b"home"):
        assert secret not in seen


@settings(max_examples=10)
@given(st.integers(0, 10**8 - 1))
def test_another_code_is_told_by_the_proof(number: int) -> None:
    guess = f"{number:08}".encode()
    master, device = MasterExchange(CODE), DeviceExchange(guess)
    proof = device.request(master.answer(device.hello()), REQUEST)
    if guess == CODE:
        assert master.confirmed(proof) == REQUEST
        return
    with pytest.raises(WrongCodeError):
        master.confirmed(proof)


@settings(max_examples=50)
@given(anything)
def test_a_first_message_of_anything(message: bytes) -> None:
    with pytest.raises(IdentityError):
        MasterExchange(CODE).answer(message)


@settings(max_examples=50)
@given(st.one_of(st.binary(min_size=32, max_size=32), st.just(bytes(32))))
def test_elements_of_anything(element: bytes) -> None:
    """Most are no points of the group; who sends one that is has not proved anything yet."""
    master, device = MasterExchange(CODE), DeviceExchange(CODE)
    try:
        master.answer(b"tpirt join 1B" + element)
    except IdentityError:
        pass
    else:
        with pytest.raises(WrongCodeError):
            master.confirmed(bytes(100))
    try:
        device.request(b"A" + element, REQUEST)
    except IdentityError:
        return
    with pytest.raises(IdentityError):
        device.accept(b"\0" + bytes(100))


@settings(max_examples=30)
@given(st.data())
def test_changed_messages_are_refused(data: st.DataObject) -> None:
    master, device = MasterExchange(CODE), DeviceExchange(CODE)
    wire = device.request(master.answer(device.hello()), REQUEST)
    with pytest.raises(IdentityError):
        master.confirmed(changed(wire, data))
    assert master.confirmed(wire) == REQUEST
    with pytest.raises(IdentityError):
        device.accept(changed(master.reply(REPLY), data))
    assert not master.kept(changed(device.kept(), data))


def test_a_reflection_is_refused() -> None:
    device = DeviceExchange(CODE)
    with pytest.raises(IdentityError):
        device.request(device.hello()[len(b"tpirt join 1") :], REQUEST)


def test_codes() -> None:
    codes = {new_code() for _ in range(50)}
    assert len(codes) > 45
    for code in codes:
        assert read_code(code) == code.replace("-", "").encode()
        assert len(read_code(code.replace("-", " "))) == 8
