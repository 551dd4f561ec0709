"""When a batch starts: the rules of fastcm.serving.batching, with a draw that tells what it was given."""

import asyncio
import time

import numpy as np
import pytest

from fastcm.serving.batching import Batcher


def batches_of(scenario, *, clients: int, window_s: float, draw_s: float = 0.0) -> list[list[int]]:
    """The seeds of every batch that the scenario, a function of the batcher, leads to."""
    drawn = []

    def draw(seeds, labels, how):
        drawn.append(seeds.tolist())
        time.sleep(draw_s)
        return np.zeros((len(seeds), 1, 1, 1), np.uint8)

    async def main() -> None:
        batcher = Batcher(draw, max_batch=64, window_s=window_s, queue_images=64, clients=lambda: clients, drawn=lambda count: None)
        running = asyncio.create_task(batcher.run())
        try:
            await asyncio.wait_for(scenario(batcher), 30)
        finally:
            running.cancel()

    asyncio.run(main())
    return drawn


async def client(batcher: Batcher, number: int, requests: int) -> None:
    for _ in range(requests):
        await batcher.images(np.array([number]), None, "how")


@pytest.mark.slow
def test_clients_that_ask_again_stay_together():
    """Half of the clients come while the others' batch is drawn, and wait for longer than the window: the next batch holds everybody."""

    async def scenario(batcher: Batcher) -> None:
        early = [asyncio.create_task(client(batcher, number, 4)) for number in range(2)]
        await asyncio.sleep(0.3)  # the first batch, of two, is being drawn
        await asyncio.gather(*early, *(client(batcher, number, 3) for number in range(2, 4)))

    drawn = batches_of(scenario, clients=4, window_s=0.2, draw_s=0.6)
    assert drawn[0] == [0, 1]
    assert [sorted(batch) for batch in drawn[1:]] == [[0, 1, 2, 3]] * 3


def test_a_client_alone_does_not_wait():
    async def scenario(batcher: Batcher) -> None:
        await asyncio.wait_for(client(batcher, 0, 20), 5)

    assert batches_of(scenario, clients=1, window_s=10.0) == [[0]] * 20


def test_a_silent_client_delays_by_the_window_only():
    async def scenario(batcher: Batcher) -> None:
        start = asyncio.get_running_loop().time()
        await client(batcher, 0, 1)
        assert 0.2 <= asyncio.get_running_loop().time() - start < 5

    assert batches_of(scenario, clients=2, window_s=0.2) == [[0]]
