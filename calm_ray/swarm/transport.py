"""One mend for hivemind's streams, so that a stranger's message cannot fill our memory.

Stock reads a message of whatever length its sender announces, up to 2^64 bytes, before anything looks at it. Calls that
are no streams are bounded by libp2p's daemon already.
"""

import asyncio

from hivemind.p2p import P2P

MAX_STREAM_MESSAGE_BYTES = 4 << 20
"""As libp2p's daemon has it for other calls. Ours, and bare hivemind's, have at most a quarter of it."""


async def _receive_raw_data(reader: asyncio.StreamReader) -> bytes:
    """As `P2P.receive_raw_data`; ValueError, before it is read, if a message is too long."""
    length = int.from_bytes(await reader.readexactly(P2P.HEADER_LEN), P2P.BYTEORDER)
    if length > MAX_STREAM_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes, at most {MAX_STREAM_MESSAGE_BYTES} are read")
    return await reader.readexactly(length)


def bound_messages() -> None:
    """From now on, in this process and those it forks. Idempotent; call before the first stream."""
    P2P.receive_raw_data = staticmethod(_receive_raw_data)
