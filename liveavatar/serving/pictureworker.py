"""The process that decodes a stranger's video: standard input -> pictures on standard output.

Run by routes_watermark as `python -I pictureworker.py PICTURES PIXELS CPU MEMORY`. Imports nothing of ours and no torch, like
soundworker.py. Output: width and height as two little-endian 32-bit numbers, then RGB pictures of that size. On refusal:
exit status 1 and one line on stderr.
"""

import io
import itertools
import resource
import struct
import sys

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,flv"  # demuxers; none that reads a list of other files
PROTOCOLS = "file,pipe"
STREAMS = 8


class Refused(Exception):
    """What is wrong with the file."""


def restrict(cpu: int, memory: int) -> None:
    """Limits of this process for good: processor seconds, address space, no file written, no core dump."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def decode(data: bytes, pictures: int, pixels: int, out) -> None:
    """Write the first so many pictures to `out`, all of the first one's size. Raises Refused."""
    import av

    options = {"protocol_whitelist": PROTOCOLS, "format_whitelist": FORMATS, "enable_drefs": "0", "use_absolute_path": "0"}
    size = None
    try:
        with av.open(io.BytesIO(data), container_options=options) as container:
            if not container.streams.video or len(container.streams) > STREAMS:
                raise Refused(f"a video has a stream of pictures, and at most {STREAMS} streams")
            container.streams.video[0].thread_count = 1
            for frame in itertools.islice(container.decode(video=0), pictures):
                if size is None:
                    size = frame.width, frame.height
                    if size[0] * size[1] > pixels:
                        raise Refused(f"{size[0]}x{size[1]}: more than {pixels // 1_000_000} million pixels")
                    out.write(struct.pack("<II", *size))
                out.write(frame.to_ndarray(format="rgb24", width=size[0], height=size[1]).tobytes())
    except av.FFmpegError as error:
        if size is None:
            raise Refused(f"not a video that can be decoded ({error.strerror})") from None
    if size is None:
        raise Refused("the video holds no picture")


def main(words: list[str]) -> int:
    """Exit status. words: of the command line."""
    pictures, pixels, cpu, memory = (int(word) for word in words)
    restrict(cpu, memory)
    try:
        decode(sys.stdin.buffer.read(), pictures, pixels, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    except Refused as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    except MemoryError:
        print("the video takes more memory than allowed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
