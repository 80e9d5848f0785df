"""An episode's frames as bytes: consecutive chunks of up to CHUNK_FRAMES pictures, each decodable by itself.

"zstd" is lossless, for any array: a rendered game takes a fourteenth of its raw size, costs less to compress than to
simulate, and any streaming zstd reader reads all chunks as one file. "h264" is for filmed video, which zstd hardly
shrinks. Either way a random clip decodes one or two chunks, not the episode, and a chunk carries its checksum.
"""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
import zstandard
from numpy.typing import NDArray

CHUNK_FRAMES = 32
Codec = Literal["zstd", "h264"]
EXTENSIONS: dict[Codec, str] = {"zstd": "rgb.zst", "h264": "mp4"}  # of the members in a shard's tar
_CHECK = struct.Struct(">I4sI")  # an MP4 box that players skip: its size, "free", CRC-32 of what comes before


class DamagedChunkError(ValueError):
    """A chunk's bytes are not those that were written."""


@dataclass(frozen=True)
class Episode:
    """One episode's compressed frames: up to `first_chunk` in the first chunk, up to CHUNK_FRAMES in each later one.

    `about` is where the frames are from, for people and filters, never for a model; it goes into the tar as JSON. Three
    of its fields are looked up by: "source" (the video's id), "owner", and "digest" (SHA-256 of the frames, 64 hex
    digits), by which clips that are the same are found.
    """

    num_frames: int
    first_chunk: int
    chunks: Sequence[bytes]
    about: Mapping[str, Any] = field(default_factory=dict)
    codec: Codec = "zstd"


def compress(
    frames: NDArray[np.generic],
    codec: Codec = "zstd",
    quality: int = 18,
    fps: float = 10.0,
    about: Mapping[str, Any] | None = None,
) -> Episode:
    """A whole episode of frames (T, ...), cut at every multiple of CHUNK_FRAMES. Equal frames make equal bytes.

    "h264" takes uint8 (T,H,W,3) alone; `quality` is its CRF (lower is better), and `fps` says how fast a player shows
    it. Raises ValueError for another codec.
    """
    if codec not in get_args(Codec):
        raise ValueError(f"codec={codec}: one of {', '.join(get_args(Codec))}")
    if codec == "zstd":
        compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
        starts = range(0, len(frames), CHUNK_FRAMES)
        chunks = [compressor.compress(frames[i : i + CHUNK_FRAMES].tobytes()) for i in starts]
    else:
        chunks = _h264(frames, quality, fps)
    return Episode(len(frames), CHUNK_FRAMES, chunks, about or {}, codec)


def decompress(chunk: bytes, codec: Codec, frame_shape: Sequence[int]) -> bytes:
    """The frames' bytes. Raises DamagedChunkError."""
    if codec == "zstd":
        try:
            return zstandard.ZstdDecompressor().decompress(chunk)
        except zstandard.ZstdError:
            raise DamagedChunkError("zstd") from None
    return _frames_of_h264(chunk, frame_shape)


def _h264(frames_THWC: NDArray[np.generic], quality: int, fps: float) -> list[bytes]:
    """Chunks that follow each other as one fragmented MP4, which players and browsers open.

    The first one begins with the file's header; each is a fragment that starts with a key frame and brings the stream's
    parameters along, so that it needs no other. The picture is padded to even sides, as its colours have half its size.
    """
    import av  # only who has such video needs it

    height, width = frames_THWC.shape[1:3]
    even_THWC = np.pad(frames_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
    rate, file = Fraction(fps).limit_denominator(1001), io.BytesIO()
    flags = "empty_moov+default_base_moof+frag_keyframe+skip_trailer"
    with av.open(file, "w", format="mp4", options={"movflags": flags, "fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = even_THWC.shape[2], even_THWC.shape[1], "yuv420p"
        # With mbtree, equal frames of some sizes made other bytes now and then: it reads memory that was never set.
        x264 = f"keyint={CHUNK_FRAMES}:min-keyint={CHUNK_FRAMES}:scenecut=0:bframes=0:mbtree=0:repeat-headers=1"
        stream.options = {"crf": str(quality), "threads": "1", "x264-params": x264}
        for frame_HWC in even_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode(None))
    data = file.getvalue()
    fragments = [start for kind, start, _ in _boxes(data) if kind == b"moof"]
    return [_checked(data[a:b]) for a, b in itertools.pairwise([0, *fragments[1:], len(data)])]


def _frames_of_h264(chunk: bytes, frame_shape: Sequence[int]) -> bytes:
    import av

    if _checked(chunk[: -_CHECK.size]) != chunk:
        raise DamagedChunkError("h264")
    (stream,) = [chunk[start:stop] for kind, start, stop in _boxes(chunk) if kind == b"mdat"]
    units, place = [], 8
    while place < len(stream):  # the decoder takes a start code before each unit, where MP4 has its length
        size = int.from_bytes(stream[place : place + 4], "big")
        units += [b"\0\0\0\1", stream[place + 4 : place + 4 + size]]
        place += 4 + size
    decoder = av.CodecContext.create("h264", "r")
    decoder.thread_count = 1  # the loader has a thread for each clip
    packets = decoder.parse(b"".join(units)) + decoder.parse(b"")
    height, width, _ = frame_shape
    frames = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    return b"".join(frame.to_ndarray(format="rgb24")[:height, :width].tobytes() for frame in frames)


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The MP4's boxes: kind, start, stop."""
    start = 0
    while start < len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        yield kind, start, start + size
        start += size


def _checked(data: bytes) -> bytes:
    return data + _CHECK.pack(_CHECK.size, b"free", zlib.crc32(data))
