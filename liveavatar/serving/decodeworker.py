"""The process that decodes a stranger's file: standard input -> samples or pictures on standard output.

    python -I decodeworker.py CPU MEMORY sound SECONDS STREAMS RATE CHANNELS    float32, 16 kHz mono
    python -I decodeworker.py CPU MEMORY pictures COUNT STREAMS PIXELS         width, height as two little-endian 32-bit numbers; RGB

Run by uploads.worker. Imports nothing of ours and no torch: it must start in a tenth of a second and fit its memory. On refusal:
exit status 1 and one line "kind<TAB>text" on stderr.
"""

import io
import itertools
import resource
import struct
import sys

RATE = 16_000  # Hz: core.SAMPLE_RATE
SOUND_FORMATS = "wav,w64,ogg,flac,mp3,aac,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,aiff"  # demuxers; none that reads a list of other files
VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,flv"
PROTOCOLS = "file,pipe"


class Refused(Exception):
    """kind: "refused" or "long"."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


def restrict(cpu: int, memory: int) -> None:
    """Limits of this process for good: processor seconds, address space, no file written, no core dump."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def opened(data: bytes, formats: str):
    """The container; nothing it names outside itself is opened."""
    import av

    options = {"protocol_whitelist": PROTOCOLS, "format_whitelist": formats, "enable_drefs": "0", "use_absolute_path": "0"}
    return av.open(io.BytesIO(data), container_options=options)


def first(container, kind: str, streams: int):
    """Its first stream of a kind, "audio" or "video". Raises Refused."""
    if len(container.streams) > streams:
        raise Refused("refused", f"{len(container.streams)} streams: at most {streams}")
    found = getattr(container.streams, kind)
    if not found:
        raise Refused("refused", f"the file holds no {kind} stream")
    found[0].thread_count = 1
    return found[0]


# ---------------------------------------------------------------- sound


def sound(data: bytes, out, seconds: float, streams: int, rate: int, channels: int) -> None:
    """Write the sound of a file to `out` as it is decoded. Raises Refused."""
    import av

    written = 0
    try:
        with opened(data, SOUND_FORMATS) as container:
            for samples in _resampled(container.decode(first(container, "audio", streams)), rate, channels):
                written += len(samples)
                if written > seconds * RATE:
                    raise Refused("long", f"more than {seconds:g} s of sound")
                out.write(samples.astype("<f4").tobytes())
    except av.FFmpegError as error:
        raise Refused("refused", f"not a recording that can be decoded ({error.strerror})") from None
    if not written:
        raise Refused("refused", "the recording holds no sound")


def _resampled(frames, rate: int, channels: int):
    """float32 [n] pieces of mono at RATE; a format may change on the way."""
    import av

    resampler, shape = None, None
    for frame in frames:
        if not 0 < frame.sample_rate <= rate or frame.layout.nb_channels > channels:
            raise Refused("refused", f"{frame.sample_rate} Hz, {frame.layout.nb_channels} channels: at most {rate} and {channels}")
        frame.pts = None
        if shape != (frame.format.name, frame.layout.name, frame.sample_rate):
            yield from _floats(resampler.resample(None) if resampler else ())
            shape, resampler = (frame.format.name, frame.layout.name, frame.sample_rate), av.AudioResampler(format="s32", layout="mono", rate=RATE)
        yield from _floats(resampler.resample(frame))
    yield from _floats(resampler.resample(None) if resampler else ())


def _floats(frames):
    for frame in frames:
        if frame.samples:
            yield frame.to_ndarray()[0] / 2.0**31


# ---------------------------------------------------------------- pictures


def pictures(data: bytes, out, count: int, streams: int, pixels: int) -> None:
    """Write the first so many pictures to `out`, all of the first one's size. Raises Refused."""
    import av

    size = None
    try:
        with opened(data, VIDEO_FORMATS) as container:
            for frame in itertools.islice(container.decode(first(container, "video", streams)), count):
                if size is None:
                    size = frame.width, frame.height
                    if size[0] * size[1] > pixels:
                        raise Refused("refused", f"{size[0]}x{size[1]}: more than {pixels // 1_000_000} million pixels")
                    out.write(struct.pack("<II", *size))
                out.write(frame.to_ndarray(format="rgb24", width=size[0], height=size[1]).tobytes())
    except av.FFmpegError as error:  # what was decoded before counts
        if size is None:
            raise Refused("refused", f"not a video that can be decoded ({error.strerror})") from None
    if size is None:
        raise Refused("refused", "the video holds no picture")


def main(words: list[str]) -> int:
    """Exit status. words: of the command line."""
    cpu, memory, job, most, *limits = words
    restrict(int(cpu), int(memory))
    try:
        data, out, limits = sys.stdin.buffer.read(), sys.stdout.buffer, [int(limit) for limit in limits]
        sound(data, out, float(most), *limits) if job == "sound" else pictures(data, out, int(most), *limits)
        out.flush()
    except Refused as error:
        print(f"{error.kind}\t{' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except MemoryError:
        print("refused\tthe file takes more memory than allowed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
