"""The process that decodes a stranger's recording: standard input -> float32 16 kHz mono on standard output.

Run by uploads.recording as `python -I soundworker.py SECONDS STREAMS RATE CHANNELS CPU MEMORY`. Imports nothing of ours and no
torch: it must start in a tenth of a second and fit its memory. On refusal: exit status 1 and one line "kind<TAB>text" on stderr.
"""

import io
import resource
import sys

RATE = 16_000  # Hz: core.SAMPLE_RATE
FORMATS = "wav,w64,ogg,flac,mp3,aac,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,aiff"  # demuxers; none that reads a list of other files
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


def decode(data: bytes, seconds: float, streams: int, rate: int, channels: int, out) -> None:
    """Write the sound of a file to `out` as it is decoded. Raises Refused."""
    import av

    options = {"protocol_whitelist": PROTOCOLS, "format_whitelist": FORMATS, "enable_drefs": "0", "use_absolute_path": "0"}
    try:
        with av.open(io.BytesIO(data), container_options=options) as container:
            stream = _chosen(container, streams)
            stream.thread_count = 1
            written = 0
            for samples in _resampled(container.decode(stream), rate, channels):
                written += len(samples)
                if written > seconds * RATE:
                    raise Refused("long", f"more than {seconds:g} s of sound")
                out.write(samples.astype("<f4").tobytes())
    except av.FFmpegError as error:
        raise Refused("refused", f"not a recording that can be decoded ({error.strerror})") from None
    if not written:
        raise Refused("refused", "the recording holds no sound")


def _chosen(container, streams: int):
    if len(container.streams) > streams:
        raise Refused("refused", f"{len(container.streams)} streams: at most {streams}")
    if not container.streams.audio:
        raise Refused("refused", "the file holds no audio stream")
    return container.streams.audio[0]


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


def main(words: list[str]) -> int:
    """Exit status. words: of the command line."""
    seconds, streams, rate, channels, cpu, memory = float(words[0]), *(int(word) for word in words[1:])
    restrict(cpu, memory)
    try:
        decode(sys.stdin.buffer.read(), seconds, streams, rate, channels, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    except Refused as error:
        print(f"{error.kind}\t{' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except MemoryError:
        print("refused\tthe recording takes more memory than allowed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
