"""One suite over every communicator and every channel: what the decoder may rely on."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch

from tests.support.nightly import nightly_but
from tpirt.batch import Algorithm, Batch, Collective, CommDtype, Segment
from tpirt.collectives.base import SingleRankCommunicator
from tpirt.collectives.context import StepAborted, StepContext
from tpirt.errors import PeerLostError, TransportError
from tpirt.ops.buffers import tensor_bytes
from tpirt.protocol.tensors import decode, encode, values
from tpirt.testing.faults import Fault, FaultyChannel
from tpirt.testing.ranks import Pair, Rank, in_memory, linked_ranks, over_sockets
from tpirt.transport.base import Channel

TWO_PARTS = Collective(Algorithm.STAR, CommDtype.FLOAT32, micro_batches=True)
ALGORITHMS = pytest.mark.parametrize("algorithm", Algorithm, ids=lambda a: a.value)
PAIRS: dict[str, Pair] = {
    "memory": in_memory,
    "narrow": partial(in_memory, 64 << 10),
    "tcp": partial(over_sockets, "tcp"),
    "grpc": partial(over_sockets, "grpc"),
}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return PAIRS[request.param]


def partials(world: int, shape: tuple[int, ...] = (3, 5)) -> list[torch.Tensor]:
    # Of very different sizes: any other order of adding gives other bits.
    return [
        torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * 10.0 ** (rank % 4 * 2)
        for rank in range(world)
    ]


def in_rank_order(values: Sequence[torch.Tensor]) -> torch.Tensor:
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total


async def test_a_single_rank_sums_to_itself() -> None:
    comm = SingleRankCommunicator()
    step = StepContext(1, Batch((Segment(0, 0, 2, 1, 2),)))
    value = torch.randn(2, 3)
    assert torch.equal(await comm.all_reduce(step, 0, value.clone()), value)
    assert torch.equal(await comm.reduce(step, value.clone()), value)


@ALGORITHMS
@pytest.mark.parametrize("world", [2, 3, 4])
async def test_sums_in_rank_order_whatever_the_order_of_arrival(
    pair: Pair, world: int, algorithm: Algorithm
) -> None:
    values = partials(world)
    expected = in_rank_order(values)
    other_orders = {
        in_rank_order(order).numpy().tobytes() for order in itertools.permutations(values)
    }
    assert world == 2 or len(other_orders) > 1  # else this test would show nothing
    async with linked_ranks(pair, world) as ranks:
        for number, order in enumerate(itertools.permutations(range(world)), start=1):
            steps = [rank.begin(number, Collective(algorithm)) for rank in ranks]
            tasks = {}
            for r in order:
                sum_ = ranks[r].comm.all_reduce(steps[r], 0, values[r].clone())
                tasks[r] = asyncio.create_task(sum_)
                await asyncio.sleep(0)
            sums = [await tasks[r] for r in range(world)]
            assert all(torch.equal(total, expected) for total in sums)


@ALGORITHMS
async def test_many_collectives_in_a_step_and_a_last_reduce(
    pair: Pair, algorithm: Algorithm
) -> None:
    async def run(rank: Rank) -> list[torch.Tensor | None]:
        out: list[torch.Tensor | None] = []
        for number in (1, 2):
            step = rank.begin(number, Collective(algorithm))
            for n in range(5):
                value = torch.full((2, 2), float(rank.rank + n))
                out.append(await rank.comm.all_reduce(step, 0, value))
            out.append(await rank.comm.reduce(step, torch.full((1, 2), 1.0)))
        return out

    async with linked_ranks(pair, 3) as ranks:
        results = await asyncio.gather(*map(run, ranks))
    for r, result in enumerate(results):
        for at, total in enumerate(result):
            if at % 6 < 5:
                assert total is not None
                assert total.eq(3.0 * (at % 6) + 3).all()
            elif r == 0:
                assert total is not None
                assert total.eq(3).all()
            else:
                assert total is None


@pytest.mark.parametrize("comm_dtype", CommDtype, ids=lambda comm_dtype: comm_dtype.value)
@pytest.mark.parametrize("world", [2, 3, 5])
async def test_all_ranks_and_algorithms_have_the_same_bits_in_every_form(
    comm_dtype: CommDtype, world: int
) -> None:
    values = partials(world, (3, 130))
    sums: list[torch.Tensor] = []
    async with linked_ranks(in_memory, world) as ranks:
        for number, algorithm in enumerate(Algorithm, start=1):
            steps = [rank.begin(number, Collective(algorithm, comm_dtype)) for rank in ranks]
            sums += await asyncio.gather(
                *(r.comm.all_reduce(steps[r.rank], 0, values[r.rank].clone()) for r in ranks)
            )
    exact = in_rank_order(values)
    assert all(torch.equal(total, sums[0]) for total in sums)
    if comm_dtype is CommDtype.FLOAT32:
        assert torch.equal(sums[0], exact)
    error = {CommDtype.FLOAT32: 0.0, CommDtype.BFLOAT16: 2**-7, CommDtype.INT8: 2**-5}[comm_dtype]
    assert (sums[0] - exact).norm() <= error * exact.norm()


@ALGORITHMS
@pytest.mark.parametrize("comm_dtype", CommDtype, ids=lambda comm_dtype: comm_dtype.value)
@pytest.mark.parametrize("columns", [128, 192])
async def test_a_row_has_the_same_bits_beside_any_others(
    algorithm: Algorithm, comm_dtype: CommDtype, columns: int
) -> None:
    """Rows are other users' and wrong guesses: they must not share a scale."""
    values = partials(3, (5, columns))
    parts = [slice(0, 5), *(slice(row, row + 1) for row in range(5)), slice(1, 4)]
    async with linked_ranks(in_memory, 3) as ranks:
        sums = []
        for number, rows in enumerate(parts, start=1):
            steps = [rank.begin(number, Collective(algorithm, comm_dtype)) for rank in ranks]
            each = [value[rows].clone() for value in values]
            sums.append(
                await asyncio.gather(
                    *(r.comm.all_reduce(steps[r.rank], 0, each[r.rank]) for r in ranks)
                )
            )
            lasts = [r.comm.reduce(steps[r.rank], each[r.rank]) for r in ranks]
            sums[-1].append((await asyncio.gather(*lasts))[0])
    for rows, some in zip(parts, sums, strict=True):
        for whole, part in zip(sums[0], some, strict=True):
            assert torch.equal(part, whole[rows])


@ALGORITHMS
async def test_everyone_may_send_more_than_the_way_holds(pair: Pair, algorithm: Algorithm) -> None:
    async def run(rank: Rank) -> torch.Tensor:
        step = rank.begin(1, Collective(algorithm))
        await rank.comm.all_reduce(step, 0, torch.ones(1, 2))
        value = torch.full((256, 8192), float(rank.rank))  # 8 MiB
        return await rank.comm.all_reduce(step, 0, value)

    async with linked_ranks(pair, 3) as ranks:
        sums = await asyncio.gather(*map(run, ranks))
        assert all(bool(total.eq(3).all()) for total in sums)


@pytest.mark.parametrize("comm_dtype", [CommDtype.FLOAT32, CommDtype.BFLOAT16])
async def test_a_sum_may_overflow_without_a_warning(comm_dtype: CommDtype) -> None:
    values = [torch.tensor([[3e38, math.inf, 1]]), torch.tensor([[3e38, -math.inf, 1]])]
    async with linked_ranks(in_memory, 2) as ranks:
        steps = [rank.begin(1, Collective(Algorithm.ONE_SHOT, comm_dtype)) for rank in ranks]
        sums = await asyncio.gather(
            *(r.comm.all_reduce(steps[r.rank], 0, values[r.rank]) for r in ranks)
        )
    for total in sums:
        assert total[0].isinf().tolist() == [True, False, False]
        assert total[0].isnan().tolist() == [False, True, False]


@ALGORITHMS
async def test_a_sum_does_not_change_what_is_still_being_sent(algorithm: Algorithm) -> None:
    """Payloads are not copied: the partial's memory is read until the last byte has left."""
    values = partials(3, (64, 8192))
    async with linked_ranks(partial(in_memory, 16 << 10), 3) as ranks:
        steps = [rank.begin(1, Collective(algorithm)) for rank in ranks]
        sums = await asyncio.gather(
            *(r.comm.all_reduce(steps[r.rank], 0, values[r.rank].clone()) for r in ranks)
        )
    assert all(torch.equal(total, in_rank_order(values)) for total in sums)


@ALGORITHMS
async def test_two_parts_of_a_step_may_be_under_way(pair: Pair, algorithm: Algorithm) -> None:
    """As micro-batches are; their order on the wire may differ from rank to rank."""

    async def run(rank: Rank) -> list[torch.Tensor]:
        step = rank.begin(1, Collective(algorithm, micro_batches=True), tokens=4)
        out = []
        for _ in range(20):
            parts = [0, 1] if rank.rank % 2 else [1, 0]
            tasks = {}
            for part in parts:
                value = torch.full((2, 7), float(rank.rank + 10 * part))
                tasks[part] = asyncio.create_task(rank.comm.all_reduce(step, part, value))
                if rank.rank == 1:
                    await asyncio.sleep(0.001)
            out += [await tasks[0], await tasks[1]]
        return out

    async with linked_ranks(pair, 3) as ranks:
        for sums in await asyncio.gather(*map(run, ranks)):
            assert [float(total[0, 0]) for total in sums] == [3.0, 33.0] * 20
            assert all(bool(total.eq(total[0, 0]).all()) for total in sums)


BROADCASTS = list(
    itertools.product(((2, 7), (3, 130), (700, 1000)), (torch.float32, torch.bfloat16))
)
# In CI one for every channel; all shapes and both dtypes are among them.
QUICK_BROADCASTS = {
    ("memory", (2, 7), torch.float32),
    ("narrow", (700, 1000), torch.float32),
    ("tcp", (700, 1000), torch.float32),
    ("grpc", (3, 130), torch.bfloat16),
}


@pytest.mark.parametrize(
    ("pair", "shape", "dtype"),
    nightly_but(
        QUICK_BROADCASTS,
        ((name, *rows) for name, rows in itertools.product(PAIRS, BROADCASTS)),
        lambda case: "-".join(map(str, case)),
    ),
    indirect=["pair"],
)
@ALGORITHMS
async def test_broadcasts_of_both_parts(
    pair: Pair, algorithm: Algorithm, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """The second part may still come when the first is summed already."""
    values = [torch.randn(shape).to(dtype) for _ in range(2)]

    async def run(rank: Rank) -> list[torch.Tensor]:
        step = rank.begin(1, Collective(algorithm, micro_batches=True), tokens=4)
        halves = [half.clone() if rank.rank == 0 else torch.zeros_like(half) for half in values]
        first, second = (
            asyncio.create_task(rank.comm.broadcast(step, part, half))
            for part, half in enumerate(halves)
        )
        await first
        if rank.rank == 1:
            await asyncio.sleep(0.001)
        sums = [await rank.comm.all_reduce(step, 0, halves[0].float().clone())]
        await second
        return [*halves, *sums, await rank.comm.all_reduce(step, 1, halves[1].float().clone())]

    async with linked_ranks(pair, 4) as ranks:
        for each in await asyncio.gather(*map(run, ranks)):
            assert all(map(torch.equal, each[:2], values))
            torch.testing.assert_close(each[2:], [4 * value.float() for value in values])


@pytest.mark.parametrize("shape", [(1, 1), (1, 128), (2, 129), (3, 256), (0, 5), (1, 0)])
@pytest.mark.parametrize("comm_dtype", CommDtype, ids=lambda comm_dtype: comm_dtype.value)
def test_senders_go_on_with_what_receivers_read(
    comm_dtype: CommDtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.randn(shape) * 100
    payload, own = encode(tensor, comm_dtype)
    assert len(payload) == comm_dtype.nbytes(*shape)
    assert torch.equal(decode(bytes(payload), comm_dtype, shape), own)
    added = values(payload, comm_dtype, shape)  # the same bits, for numpy
    assert added.tobytes() == bytes(tensor_bytes(own.float()))
    assert added.shape == shape
    for decoding in (decode, values):
        with pytest.raises(TransportError, match="expected"):
            decoding(bytes(payload) + b"0", comm_dtype, shape)
    again, once_more = encode(own.clone(), comm_dtype)
    if comm_dtype is not CommDtype.INT8:
        assert bytes(again) == bytes(payload)
        assert torch.equal(once_more, own)


# -- what does not fit ---------------------------------------------------------------------------

REFUSED = {
    Fault.WRONG_STEP: "step 2",
    Fault.WRONG_SEQ: "collective",
    Fault.WRONG_SHAPE: r"\[2, 3\]",
    Fault.WRONG_DTYPE: "dtype 2",
    Fault.WRONG_SIZE: r"\[4, 2\]",
    Fault.TRUNCATE: "12 bytes",
    Fault.GARBAGE: "expected a frame",
}


@pytest.mark.parametrize("fault", REFUSED, ids=lambda fault: fault.name)
@pytest.mark.parametrize("liar", [0, 2])
async def test_a_tensor_that_does_not_fit_is_refused(fault: Fault, liar: int) -> None:
    """It must be exactly what is due, in either direction; the error is about its sender."""

    def hook(rank: int, other: int, channel: Channel) -> Channel:
        lies = {rank, other} == {0, 2} and rank == liar
        return FaultyChannel(channel, fault) if lies else channel

    async with linked_ranks(in_memory, 3, star=True, timeout_s=2.0, hook=hook) as ranks:
        steps = [rank.begin(1) for rank in ranks]
        sums = [
            asyncio.create_task(r.comm.all_reduce(steps[r.rank], 0, torch.ones(3, 2)))
            for r in ranks
        ]
        with pytest.raises(TransportError, match=REFUSED[fault]):
            await sums[2 - liar]
        for step in steps:
            step.abort(StepAborted())
        await asyncio.gather(*sums, return_exceptions=True)


async def test_a_tensor_of_a_step_that_has_ended_is_refused() -> None:
    def hook(rank: int, other: int, channel: Channel) -> Channel:
        return FaultyChannel(channel, Fault.OLD_STEP, after=1) if rank == 1 else channel

    async with linked_ranks(in_memory, 2, hook=hook) as ranks:
        steps = [rank.begin(1) for rank in ranks]
        sums = await asyncio.gather(
            *(r.comm.all_reduce(steps[r.rank], 0, torch.ones(2, 2)) for r in ranks)
        )
        assert all(total.eq(2).all() for total in sums)
        for rank in ranks:
            rank.links.end(completed=True)
        steps = [rank.begin(2) for rank in ranks]
        late = asyncio.create_task(ranks[1].comm.all_reduce(steps[1], 0, torch.ones(2, 2)))
        with pytest.raises(TransportError, match="step 1"):
            await ranks[0].comm.all_reduce(steps[0], 0, torch.ones(2, 2))
        late.cancel()


async def test_an_aborted_step_frees_everyone_and_the_next_one_is_right(pair: Pair) -> None:
    async with linked_ranks(pair, 2) as ranks:
        steps = [rank.begin(1) for rank in ranks]
        # The worker sends its partial of a collective that the master never joins.
        lost = asyncio.create_task(ranks[1].comm.all_reduce(steps[1], 0, torch.full((2, 2), 99.0)))
        await asyncio.sleep(0)
        for step in steps:
            step.abort(StepAborted())
        with pytest.raises(StepAborted):
            await lost
        for rank in ranks:
            rank.links.end(completed=False)
        steps = [rank.begin(2) for rank in ranks]
        sums = await asyncio.gather(
            *(r.comm.all_reduce(steps[r.rank], 0, torch.ones(2, 2)) for r in ranks)
        )
        assert all(total.eq(2).all() for total in sums)


@ALGORITHMS
async def test_an_abort_ends_a_send_that_nobody_takes(algorithm: Algorithm) -> None:
    """Frames larger than the way holds: the rest goes out in the background, and is dropped."""
    async with linked_ranks(partial(in_memory, 16 << 10), 3) as ranks:
        steps = [rank.begin(1, Collective(algorithm)) for rank in ranks]
        value = torch.ones(64, 8192)
        sums = [
            asyncio.create_task(r.comm.all_reduce(steps[r.rank], 0, value.clone()))
            for r in ranks[1:]
        ]
        await asyncio.sleep(0)
        for step in steps:
            step.abort(StepAborted())
        for result in await asyncio.gather(*sums, return_exceptions=True):
            assert isinstance(result, StepAborted)
        for rank in ranks:
            rank.links.end(completed=False)
        steps = [rank.begin(2, Collective(algorithm)) for rank in ranks]
        sums = [r.comm.all_reduce(steps[r.rank], 0, value.clone()) for r in ranks]
        assert all(bool(total.eq(3).all()) for total in await asyncio.gather(*sums))


@pytest.mark.parametrize(
    ("pair", "algorithm"),
    nightly_but(
        {
            ("memory", Algorithm.STAR),
            ("narrow", Algorithm.TWO_SHOT),
            ("tcp", Algorithm.ONE_SHOT),
            ("grpc", Algorithm.STAR),
        },
        itertools.product(PAIRS, Algorithm),
        lambda case: f"{case[0]}-{case[1].value}",
    ),
    indirect=["pair"],
)
async def test_a_lost_rank_is_named(pair: Pair, algorithm: Algorithm) -> None:
    async with linked_ranks(pair, 3, timeout_s=1.0) as ranks:  # over gRPC its silence shows
        steps = [rank.begin(1, Collective(algorithm)) for rank in ranks]
        sums = [
            asyncio.create_task(r.comm.all_reduce(steps[r.rank], 0, torch.ones(2, 2)))
            for r in ranks[:2]
        ]
        await asyncio.sleep(0)
        await ranks[2].links.aclose()
        with pytest.raises(PeerLostError) as caught:
            await sums[0]
        assert caught.value.rank == 2
        steps[1].abort(StepAborted())
        await asyncio.gather(*sums, return_exceptions=True)
