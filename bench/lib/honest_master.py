"""An honest master that says Hello again and again, each time on a new connection.

    python -m bench.lib.honest_master ADDRESS PERIOD_S

It writes a JSON line for each: the seconds until the answer came, or the error. It ends when
standard input does. A peer that serves another master waits a second for that one's goodbye before
it says that it is busy; this second does not count.
"""

from __future__ import annotations

import asyncio
import json
import sys

from bench.lib.clock import Clock
from tpirt.errors import TpirtError
from tpirt.protocol.messages import (
    PROTOCOL_VERSION,
    HelloReply,
    HelloRequest,
    decode_call,
    encode_call,
)
from tpirt.transport.grpc import GrpcPeerClient

_TIMEOUT_S = 30.0
_GOODBYE_S = 1.0


async def ask(address: str, clock: Clock) -> dict[str, object]:
    """Say Hello once."""
    client = GrpcPeerClient(address)
    began_s = clock.now_s()
    try:
        request = encode_call(HelloRequest(PROTOCOL_VERSION, "honest"))
        answer = await client.call("Hello", request, _TIMEOUT_S)
        reply = decode_call(HelloReply, answer, address)
    except TpirtError as exc:
        return {"error": str(exc)}
    finally:
        await client.aclose()
    return {"seconds": clock.now_s() - began_s - _GOODBYE_S * reply.busy}


async def main() -> None:
    """Ask until standard input ends."""
    address, period_s = sys.argv[1], float(sys.argv[2])
    clock = Clock()
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    while not ended.done():
        print(json.dumps(await ask(address, clock)), flush=True)
        await asyncio.sleep(period_s)


if __name__ == "__main__":
    asyncio.run(main())
