"""What goes through the pipe to the DHT process stays small enough to arrive in one piece."""

import select
from multiprocessing.reduction import ForkingPickler

from hivemind.utils import MPFuture
from hivemind.utils.crypto import RSAPrivateKey

from calm_ray.config import RunTable
from calm_ray.report import MAX_REPORT_BYTES
from calm_ray.swarm.records import own_subkey, reports_key

LONGEST_RUN_ID = "r" * 63
LENGTH_PREFIX = 4


def test_call_that_publishes_the_longest_report_fits_into_one_atomic_write() -> None:
    """The pipe's reader must not find half a message: it ends the DHT process."""
    call: tuple[object, ...] = ("_store", [], {
        "key": reports_key(LONGEST_RUN_ID), "value": b"x" * MAX_REPORT_BYTES, "subkey": own_subkey(RSAPrivateKey()),
        "expiration_time": 1e10 / 3, "future": MPFuture(),
    })  # fmt: skip
    assert LENGTH_PREFIX + len(bytes(ForkingPickler.dumps(call))) <= select.PIPE_BUF


def test_longest_run_id_is_what_the_config_allows() -> None:
    pattern = RunTable.model_json_schema()["properties"]["run_id"]["pattern"]
    assert pattern == "^[a-z0-9][a-z0-9-]{0,62}$"
