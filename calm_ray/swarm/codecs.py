"""Compression of tensors on the wire, with the one mend that stock hivemind 1.1.12 needs.

Its 8-bit codecs call `int()` on a one-element array, which numpy 2.4 refuses: every part fails to decode, and the round
is still reported as a success. The decoder is looked up in a registry by wire type, so the mend goes there, once.
"""

import math

import numpy as np
import torch
from hivemind.compression import CompressionBase, Float16Compression, NoCompression, SizeAdaptiveCompression
from hivemind.compression import serialization as _serialization
from hivemind.compression.quantization import Quantile8BitQuantization, Quantization, Uniform8BitQuantization
from hivemind.proto import runtime_pb2

SMALL_TENSOR_ELEMENTS = 2**16 + 1
"""Biases and norms below this stay in 16 bits when the rest goes in 8, as in CALM (`task.py`)."""


_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


class _SafeExtract(Quantization):
    def extract(self, serialized_tensor: runtime_pb2.Tensor) -> torch.Tensor:
        """Decode `codebook size | codebook | indices`; raises ValueError if a stranger's message does not add up."""
        buffer, size = serialized_tensor.buffer, tuple(serialized_tensor.size)
        if serialized_tensor.dtype not in _DTYPES:
            raise ValueError(f"dtype {serialized_tensor.dtype[:20]!r}, expected one of {', '.join(_DTYPES)}")
        codebook_size = int(np.frombuffer(buffer, count=1, dtype=np.int64)[0])
        if not 0 < codebook_size <= self.n_bins:
            raise ValueError(f"codebook of {codebook_size} entries, expected 1 to {self.n_bins}")
        codebook = np.frombuffer(buffer, offset=8, count=codebook_size, dtype=self.codebook_dtype)
        indices = np.frombuffer(buffer, offset=8 + codebook.nbytes, dtype=self.indices_dtype)
        if min(size, default=0) < 0 or math.prod(size) != len(indices):
            raise ValueError(f"{len(indices)} indices for a tensor of size {size}")
        if indices.max(initial=0) >= codebook_size:
            raise ValueError(f"index {indices.max()} into a codebook of {codebook_size} entries")
        lookup = torch.as_tensor(codebook.copy()).to(_DTYPES[serialized_tensor.dtype])
        quantized = torch.as_tensor(indices.astype(np.int64)).reshape(size)
        return lookup[quantized].requires_grad_(serialized_tensor.requires_grad)


class Uniform8Bit(_SafeExtract, Uniform8BitQuantization):
    """256 evenly spaced levels within six standard deviations of the mean."""


class Quantile8Bit(_SafeExtract, Quantile8BitQuantization):
    """256 levels at the tensor's quantiles."""


def mend_codecs() -> None:
    """Let this process decode 8-bit tensors. Idempotent; call before averaging or downloading state."""
    registry = _serialization._BASE_COMPRESSION_TYPES
    registry["UNIFORM_8BIT"], registry["QUANTILE_8BIT"] = Uniform8Bit(), Quantile8Bit()


def gradient_codec(name: str) -> CompressionBase:
    """The codec for `[run.averaging] compression`: "none", "fp16" or "8bit"."""
    if name == "8bit":
        return SizeAdaptiveCompression(
            threshold=SMALL_TENSOR_ELEMENTS, less=Float16Compression(), greater_equal=Uniform8Bit()
        )
    return {"none": NoCompression(), "fp16": Float16Compression()}[name]
