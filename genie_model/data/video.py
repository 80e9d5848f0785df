"""A video file as frames of one rate, size and colour: the only reader of containers and codecs (PyAV, in-process).

What is done to a video that is not plain, so that a model need not know: it is turned upright as its display matrix
says, pixels that are not square are stretched, a variable frame rate becomes a constant one (each frame is shown at the
nearest instant, and stays until the next), and HDR (PQ and HLG) becomes SDR: what is darker than 60% of reference white
(203 cd/m2, BT.2408) stays as it is, what is brighter is rolled off, in the gamut of BT.709.

A video is taken whole or not at all: the first part that cannot be decoded rejects it, since decoders paint over what
they miss. Files are not trusted: of containers only those in _CONTAINERS are opened (no playlists, which would fetch
other files), none may open another file, and no picture above max_pixels is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from genie_model.data.sources import Framing, Note, Rejected, no_note

_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,asf,ogg,gif,nut,ivf,wtv,rm,swf,dv,mxf"
_SCALING = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT  # the same bytes on every machine
_MAX_GAP = 60.0  # seconds for which a picture may stand still
_MAX_BACK = 1.0  # seconds that a timestamp may go back; such frames are dropped
_MAX_MISSING = 0.5  # seconds, and a hundredth, that a video may end early: heads are not exact
_MAX_RATE = 1000  # source frames in a second
_HALF = 0.5 + 1e-6  # a time half way between two instants is of the later one, however it was rounded
_UNSPECIFIED = 2  # FFmpeg's AVCOL_SPC_UNSPECIFIED
_HD_HEIGHT = 720  # from here on colours that are not said are BT.709's, below BT.601's
_REFERENCE_WHITE = 203.0  # cd/m2
_KNEE = 0.6
_BT2020_TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])


def decode(
    file: BinaryIO, framing: Framing, note: Note = no_note, start: float = 0.0, stop: float = math.inf
) -> Iterator[NDArray[np.uint8]]:
    """uint8 (height, width, 3) at framing.fps: the video of the open file, from `start` to `stop` seconds.

    Raises Rejected. An error of `file` itself, such as a bucket that does not answer, is raised as it is.
    """
    head = file.read(8)
    if not head:
        raise Rejected("empty", "0 bytes")
    file.seek(0)
    try:
        container = av.open(
            file,
            "r",
            container_options={"format_whitelist": _CONTAINERS},
            metadata_errors="replace",
            buffer_size=1 << 18,
            io_open=_no_other_file,
        )
    except av.FFmpegError as error:
        if head[4:] == b"ftyp":  # the index of a film is often written last, and cannot be done without
            raise Rejected("truncated", "an MP4 whose index (moov) is missing or damaged") from None
        raise Rejected("not a video", _words(error)) from None
    with container:
        stream = _picture_stream(container, framing)
        if start:
            container.seek(math.floor(start * 1e6) + (container.start_time or 0))
        pictures = _pictures(container, stream, start, stop)
        yield from _resampled(pictures, _Converter(framing, stream, note), framing.fps, note)


def _no_other_file(url: str, flags: int, options: Any) -> None:
    raise PermissionError(f"the video wants to open {url}")


def _words(error: av.FFmpegError) -> str:
    return error.strerror or str(error)


def _picture_stream(container: InputContainer, framing: Framing) -> VideoStream:
    """The video, set to be decoded strictly. Raises Rejected where there is none, or one of an absurd size."""
    pictures = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not pictures:
        raise Rejected("no picture", f"{container.format.name}: {', '.join(s.type for s in container.streams)}")
    stream = pictures[0]
    context: Any = stream.codec_context
    if context is None:
        raise Rejected("corrupt", "of an unknown codec")
    if context.width and context.height:
        framing.check_size(context.height, context.width)
    context.thread_count = 1  # the processes of ingest share the cores
    context.options = {"err_detect": "+crccheck+bitstream+buffer+explode", "max_pixels": str(framing.max_pixels)}
    return stream


def _pictures(
    container: InputContainer, stream: VideoStream, start: float, stop: float
) -> Iterator[tuple[float, float, VideoFrame]]:
    """(seconds from the video's zero, seconds that it lasts or 0, frame), in the order in which they are shown."""
    zero = (container.start_time or 0) / av.time_base
    announced = (container.duration or 0) / av.time_base
    reached = 0.0
    try:
        packets = container.demux()
        for packet in packets:
            if packet.is_corrupt:
                rest = next((packet for packet in packets if packet.size), None)
                raise Rejected("corrupt" if rest else "truncated", f"after {reached:.1f} s")
            if packet.pts is not None:
                end = packet.pts + (packet.duration or 0)
                reached = max(reached, float(end * packet.time_base) - zero)
            if packet.stream_index != stream.index:
                continue
            for frame in packet.decode():
                assert isinstance(frame, VideoFrame)
                if frame.is_corrupt:
                    raise Rejected("corrupt", f"after {reached:.1f} s")
                stamp = frame.pts if frame.pts is not None else frame.dts
                if stamp is None or frame.time_base is None:
                    raise Rejected("timestamps", "a frame has none")
                seconds = float(stamp * frame.time_base) - zero
                if seconds >= stop - 1e-6:
                    return
                if seconds >= start - 1e-6:
                    yield seconds, float(frame.duration * frame.time_base), frame
    except av.FFmpegError as error:
        raise Rejected("corrupt", f"after {reached:.1f} s: {_words(error)}") from None
    expected = min(announced, stop)
    if reached < expected * 0.99 - _MAX_MISSING:
        raise Rejected("truncated", f"{reached:.1f} s of {expected:.1f} s")


def _resampled(
    pictures: Iterator[tuple[float, float, VideoFrame]], convert: _Converter, fps: float, note: Note
) -> Iterator[NDArray[np.uint8]]:
    """Each picture is shown from the instant k / fps that is nearest to its time, until the next one is."""
    shown: VideoFrame | None = None
    zero = last = second = lasts = 0.0
    in_second, number, shortest, longest = 0, 0, math.inf, 0.0
    for seconds, duration, frame in pictures:
        if shown is None:
            zero = second = seconds
        elif seconds <= last:
            if seconds < last - _MAX_BACK:
                raise Rejected("timestamps", f"from {last:.1f} s back to {seconds:.1f} s")
            continue
        elif seconds - last > _MAX_GAP:
            raise Rejected("timestamps", f"no picture from {last:.1f} s to {seconds:.1f} s")
        else:
            lasts = seconds - last
            shortest, longest = min(shortest, lasts), max(longest, lasts)
        in_second = in_second + 1 if seconds < second + 1 else 0
        second = second if in_second else seconds
        if in_second > _MAX_RATE:
            raise Rejected("timestamps", f"over {_MAX_RATE} frames a second")
        ends = math.floor((seconds - zero) * fps + _HALF)
        if shown is not None and number < ends:
            frame_HWC = convert(shown)
            for _ in range(number, ends):
                yield frame_HWC
            number = ends
        shown, last, lasts = frame, seconds, duration or lasts
    if shown is None:
        raise Rejected("corrupt", "no picture can be decoded")
    if longest > 1.5 * shortest:
        note("variable frame rate")
    ends = math.floor((last + lasts - zero) * fps + _HALF)
    frame_HWC = convert(shown)
    for _ in range(number, ends):
        yield frame_HWC


class _Converter:
    """Decoded frames as frames of the data set."""

    def __init__(self, framing: Framing, stream: VideoStream, note: Note) -> None:
        self._framing, self._note = framing, note
        self._pixel = float(stream.sample_aspect_ratio or 1) or 1.0  # width over height
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """uint8 (height, width, 3). Raises Rejected."""
        self._framing.check_size(frame.height, frame.width)
        turns, mirrored = _orientation(frame)
        height, width = float(frame.height), frame.width * self._pixel
        inner = self._framing.inner(*((width, height) if turns % 2 else (height, width)))
        rows, columns = inner[::-1] if turns % 2 else inner
        trc = frame.color_trc
        is_hdr = trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
        colours = frame.colorspace
        if colours == _UNSPECIFIED:
            colours = Colorspace.ITU709 if frame.height >= _HD_HEIGHT else Colorspace.ITU601
        try:
            scaled = self._reformatter.reformat(
                frame, columns, rows, "rgb48le" if is_hdr else "rgb24", colours, interpolation=_SCALING, threads=1
            )
        except (av.FFmpegError, ValueError) as error:  # ValueError: a format of pixels that cannot be converted
            raise Rejected("corrupt", f"{frame.format.name}: {error}") from None
        picture_HWC: NDArray[Any] = scaled.to_ndarray()
        if is_hdr:
            picture_HWC = tone_mapped(picture_HWC, trc, frame.color_primaries)
        self._tell(frame, turns, mirrored, trc if is_hdr else None)
        if mirrored:
            picture_HWC = picture_HWC[:, ::-1]
        return self._framing.place(np.rot90(picture_HWC, turns))

    def _tell(self, frame: VideoFrame, turns: int, mirrored: bool, hdr: int | None) -> None:
        if turns:
            self._note(f"turned by {turns * 90} degrees")
        if mirrored:
            self._note("mirrored")
        if hdr is not None:
            self._note(f"HDR ({'PQ' if hdr == ColorTrc.SMPTE2084 else 'HLG'}) made SDR")
        if self._pixel != 1:
            self._note("pixels made square")
        if frame.height * frame.width > 1920 * 1080:
            self._note(f"larger than 1080p: {frame.width} x {frame.height}")


def _orientation(frame: VideoFrame) -> tuple[int, bool]:
    """(quarter turns counterclockwise, whether it is first mirrored left to right). Raises Rejected for others."""
    side_data: Any = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return 0, False
    a, b, _, c, d, *_ = np.frombuffer(side_data, "<i4").astype(float)
    mirrored = a * d - b * c < 0
    angle = math.degrees(-math.atan2(b, a) if not mirrored else -math.atan2(-b, -a))
    turns = round(angle / 90)
    if abs(angle - turns * 90) > 1:
        raise Rejected("tilted", f"by {angle:.0f} degrees")
    return turns % 4, mirrored


def tone_mapped(picture_HWC: NDArray[np.uint16], trc: int, primaries: int) -> NDArray[np.uint8]:
    """An HDR picture of 16 bits, as its transfer characteristic says (PQ or HLG), as sRGB of 8."""
    x_HWC = picture_HWC / 65535.0
    nits_HWC = _pq_nits(x_HWC) if trc == ColorTrc.SMPTE2084 else _hlg_nits(x_HWC)
    if primaries == ColorPrimaries.BT2020:
        nits_HWC = np.maximum(nits_HWC @ _BT2020_TO_709.T, 0)
    light_HWC = nits_HWC / _REFERENCE_WHITE
    # Rolled off by its brightest channel, so that hues stay.
    peak_HW1 = np.maximum(light_HWC.max(axis=-1, keepdims=True), 1e-6)
    rolled_HW1 = np.where(
        peak_HW1 <= _KNEE, peak_HW1, 1 - (1 - _KNEE) * np.exp(-np.maximum(peak_HW1 - _KNEE, 0) / (1 - _KNEE))
    )
    light_HWC = light_HWC * (rolled_HW1 / peak_HW1)
    srgb_HWC = np.where(light_HWC <= 0.0031308, 12.92 * light_HWC, 1.055 * light_HWC ** (1 / 2.4) - 0.055)
    return (srgb_HWC * 255 + 0.5).clip(0, 255).astype(np.uint8)


def _pq_nits(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """SMPTE ST 2084's electro-optical transfer function, in cd/m2."""
    root = x ** (32 / 2523)
    light: NDArray[np.float64] = np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)
    return 10_000 * light ** (8192 / 1305)


def _hlg_nits(x_HWC: NDArray[np.float64]) -> NDArray[np.float64]:
    """BT.2100's HLG on a display of 1,000 cd/m2, in cd/m2."""
    scene_HWC = np.where(x_HWC <= 0.5, x_HWC**2 / 3, (np.exp((x_HWC - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    luma_HW1 = scene_HWC @ np.array([[0.2627], [0.6780], [0.0593]])
    nits_HWC: NDArray[np.float64] = 1000 * scene_HWC * np.maximum(luma_HW1, 1e-9) ** 0.2
    return nits_HWC
