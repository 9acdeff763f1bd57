"""Encode the changes of one block of elements: gaps between changed ones, and by how much their bits went up or down.

gaps: a byte for each changed element, the number of unchanged ones before it; 255 stands for 255 unchanged ones and no
change. steps: new - old as integers that wrap around, zigzag (0, -1, 1, -2 become 0, 1, 2, 3), all lowest bytes first.
A step is mostly one unit in the last place, so that compression leaves one or two bits of it.
"""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Bits: TypeAlias = npt.NDArray[Any]
"""[N] unsigned integers: the bit patterns of a tensor's elements, in order."""

_ESCAPE = 255


class Encoding(IntEnum):
    """How a block is written."""

    SAME = 0
    SPARSE = 1
    DENSE = 2


def encode_block(positions: npt.NDArray[np.int64], old: Bits, new: Bits) -> tuple[Encoding, bytes]:
    """Encode the elements at `positions`, which rise, in the cheaper way."""
    if not positions.size:
        return Encoding.SAME, b""
    gaps = _encode_gaps(positions)
    steps = _zigzag(new[positions] - old[positions])
    # Run lengths and Huffman codes alone: there is nothing longer to find in noise, and the search costs most of the time.
    compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    sparse = b"".join(
        [struct.pack("<I", len(gaps)), compressor.compress(gaps), compressor.compress(steps), compressor.flush()]
    )
    return (Encoding.SPARSE, sparse) if len(sparse) < new.nbytes else (Encoding.DENSE, new.tobytes())


def decode_sparse(part: memoryview, dtype: np.dtype[Any]) -> tuple[npt.NDArray[np.int32], Bits]:
    """Return the positions of the changed elements, and what is to be added to each: it wraps around."""
    (gap_bytes,) = struct.unpack_from("<I", part)
    plain = zlib.decompress(part[4:])
    positions = _decode_gaps(np.frombuffer(plain, dtype=np.uint8, count=gap_bytes))
    return positions, _unzigzag(plain[gap_bytes:], dtype)


def _encode_gaps(positions: npt.NDArray[np.int64]) -> bytes:
    gaps = np.diff(positions, prepend=-1) - 1
    ends = np.cumsum(gaps // _ESCAPE + 1)
    encoded = np.full(int(ends[-1]), _ESCAPE, dtype=np.uint8)
    encoded[ends - 1] = gaps % _ESCAPE
    return encoded.tobytes()


def _decode_gaps(encoded: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    ends = np.flatnonzero(encoded != _ESCAPE)
    return np.cumsum(encoded, dtype=np.int32)[ends] + np.arange(ends.size, dtype=np.int32)


def _zigzag(steps: Bits) -> bytes:
    signed = steps.view(f"<i{steps.itemsize}")
    folded: Bits = (signed << 1) ^ (signed >> (8 * steps.itemsize - 1))
    return folded.view(np.uint8).reshape(-1, steps.itemsize).T.tobytes()


def _unzigzag(planes: bytes, dtype: np.dtype[Any]) -> Bits:
    folded: Bits = np.frombuffer(planes, dtype=np.uint8).reshape(dtype.itemsize, -1).T.copy().view(dtype)[:, 0]
    one = dtype.type(1)
    unfolded: Bits = (folded >> one) ^ (~(folded & one) + one)
    return unfolded
