"""Rounds over real libp2p daemons on the loopback interface: what every member ends with, and what it is told."""

import hashlib

import pytest
import torch

from tests.unit.swarm.loopback import group_of, peers, run, run_all, weighted_mean

# hivemind leaves sockets and subprocess transports to the garbage collector, after their loop was closed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"),
]

NUM_ELEMENTS = 400_000
ERRORS = {"none": 1e-6, "fp16": 2e-3, "8bit": 5e-2}
"""Largest difference to the exact mean of values of about 1."""


def vector(seed: int, num_elements: int = NUM_ELEMENTS) -> torch.Tensor:
    return torch.randn(num_elements, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("codec", ["none", "fp16", "8bit"])
def test_exchange_of_senders_reader_and_client_gives_all_the_same_bits(codec: str) -> None:
    """Three trainers, an auxiliary peer that reduces and brings nothing, and a trainer that nobody can call."""
    vectors = [vector(1), vector(2), vector(3), None, vector(4)]
    weights = [1.0, 2.0, 5.0, 0.0, 3.0]
    brought = [v for v in vectors if v is not None]
    expected = weighted_mean(brought, [w for w in weights if w])

    async def test() -> None:
        async with peers(5, num_elements=NUM_ELEMENTS, clients=[4]) as members:
            group = group_of(members, fractions=[0.2, 0.1, 0.4, 0.3, 0.0], senders=[0, 1, 2, 4])
            results = await run_all(members, group, vectors=vectors, weights=weights, codec=codec)
            for result in results:
                assert result.is_true, result
                assert result.average is not None
                assert result.digest == hashlib.sha256(result.average.numpy().tobytes()).hexdigest()
                assert (result.average.double() - expected).abs().max() < ERRORS[codec]
                assert result.weights == {
                    peer.name: weight for peer, weight in zip(members, weights, strict=True) if weight
                }
                assert result.total_weight == 11.0
                assert (result.group_size, result.num_senders, result.missing_fraction) == (5, 4, 0.0)
                assert not result.banned
            assert len({result.digest for result in results}) == 1
            assert results[3].bytes_sent < results[0].bytes_sent
            assert (results[3].residual is None, results[0].residual is None) == (True, codec != "8bit")

    run(test)
