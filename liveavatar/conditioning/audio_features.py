"""Speech to audio features: one column per picture, in order, in bounded memory.

A front end says which absolute samples a block needs (`span`) and turns exactly that window into
features (`encode`). Nothing else enters: so the same PCM in any chunking gives the same bytes, and
offline is streaming consumed to the end. Sources: model.md sections 9 and 20.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from liveavatar.core import FPS, SAMPLE_RATE, ConfigError, InputError
from liveavatar.models.layers import to_device
from liveavatar.models.viseme_encoder import ARTICULATORS, MELS, MoonshineVisemes, VisemeEncoder

SAMPLES_PER_FRAME = SAMPLE_RATE // FPS  # 640
BLOCK_FRAMES = 12


class AudioFrontEnd(Protocol):
    """What a conditioner needs to know about audio features.

    layers, width: of the features [layers, width, block_frames]. lookahead_samples: PCM needed
    beyond the end of a block before its features can be computed.
    """

    layers: int
    width: int
    lookahead_samples: int
    block_frames: int

    def new_stream(self, start: int = 0) -> AudioStream: ...

    def features_of(self, pcm, frames: int) -> torch.Tensor: ...

    def span(self, block: int) -> tuple[int, int]: ...

    def encode(self, window: np.ndarray, block: int) -> torch.Tensor: ...


class AudioStream:
    """The PCM of one session, 16 kHz mono, addressed by absolute sample.

    Before `start` there is silence. Only what the next block can still need is kept, so memory
    follows the window and what was pushed ahead, never the length of the session.
    """

    def __init__(self, front_end: AudioFrontEnd, start: int = 0):
        self._front_end = front_end
        self._start = start  # absolute sample of the first PCM ever pushed
        self._base = start  # absolute sample of _buffer[0]
        self._size = 0  # valid samples in _buffer
        self._buffer = np.zeros(SAMPLE_RATE, dtype=np.float32)
        self._finished = False

    @property
    def end(self) -> int:
        """Absolute sample the next pushed PCM begins at."""
        return self._base + self._size

    @property
    def nbytes(self) -> int:
        """Bytes of PCM memory held."""
        return self._buffer.nbytes

    def push(self, pcm) -> None:
        """Append pcm: float32 [n] (numpy or torch, CPU), 16 kHz mono, contiguous with what came before."""
        pcm = np.asarray(pcm)
        assert pcm.ndim == 1 and pcm.dtype == np.float32, f"pcm must be float32 [n], got {pcm.dtype} {pcm.shape}"
        assert not self._finished, "push after finish"
        self._reserve(self._size + len(pcm))
        self._buffer[self._size : self._size + len(pcm)] = pcm
        self._size += len(pcm)

    def finish(self) -> None:
        """No more PCM will come: from here on silence."""
        self._finished = True

    def truncate(self, sample: int) -> None:
        """Forget PCM at and beyond absolute `sample`; the next push continues there, also after finish."""
        assert sample >= self._base, f"sample {sample} was dropped already; kept from {self._base}"
        self._size = min(self._size, sample - self._base)
        self._finished = False

    def features(self, block: int) -> torch.Tensor:
        """Features of `block`: float32 [layers, width, block_frames]; column j is picture block_frames * block + j.

        Blocks are asked for in rising order (asking the same one twice is fine). Raises InputError
        when the PCM the block and its look-ahead need has not been pushed and finish() was not called.
        """
        start, stop = self._front_end.span(block)
        whole = self._base == self._start
        assert whole or start >= self._base, f"block {block} needs sample {start}, kept from {self._base}"
        if stop > self.end and not self._finished:
            raise InputError(
                f"block {block} needs audio up to sample {stop} (look-ahead included), only {self.end} arrived: "
                "push more, or say that the audio has ended"
            )
        self._drop_before(start)
        return self._front_end.encode(self._window(start, stop), block)

    def _window(self, start: int, stop: int) -> np.ndarray:
        """PCM [start, stop) with silence where there is none."""
        window = np.zeros(stop - start, dtype=np.float32)
        low, high = max(start, self._base), min(stop, self.end)
        if low < high:
            window[low - start : high - start] = self._buffer[low - self._base : high - self._base]
        return window

    def _drop_before(self, sample: int) -> None:
        """Move what lies at and beyond `sample` to the front of the buffer."""
        gone = min(sample - self._base, self._size)
        if gone > 0:
            self._buffer[: self._size - gone] = self._buffer[gone : self._size].copy()
            self._base, self._size = self._base + gone, self._size - gone

    def _reserve(self, samples: int) -> None:
        if samples > len(self._buffer):
            grown = np.zeros(2 * samples, dtype=np.float32)
            grown[: self._size] = self._buffer[: self._size]
            self._buffer = grown


class _Streaming:
    """What every front end does the same way, given `span` and `encode`."""

    def new_stream(self, start: int = 0) -> AudioStream:
        """A session's stream; before absolute sample `start` there is silence."""
        return AudioStream(self, start)

    def features_of(self, pcm, frames: int) -> torch.Tensor:
        """pcm: float32 [n] of a whole recording -> float32 [layers, width, frames]: the stream consumed to its end."""
        stream = self.new_stream()
        stream.push(pcm)
        stream.finish()
        blocks = [stream.features(b) for b in range(-(-frames // self.block_frames))]
        return torch.cat(blocks, dim=-1)[..., :frames] if blocks else torch.zeros(self.layers, self.width, 0)


# ---------------------------------------------------------------- log-mel


def _mel_filters(mels: int, bins: int, low: float, high: float) -> np.ndarray:
    """Triangular filters [bins, mels] with corners equally spaced in HTK mel between low and high Hz."""
    edges = 2595.0 * np.log10(1.0 + np.array([low, high]) / 700.0)
    corners = 700.0 * (10.0 ** (np.linspace(*edges, mels + 2) / 2595.0) - 1.0)
    hertz = np.linspace(0.0, SAMPLE_RATE / 2, bins)[:, None]
    rise = (hertz - corners[:-2]) / (corners[1:-1] - corners[:-2])
    fall = (corners[2:] - hertz) / (corners[2:] - corners[1:-1])
    return np.maximum(0.0, np.minimum(rise, fall))


TICK, WINDOW, N_FFT = 160, 400, 512
MEL_MEAN, MEL_STD = -6.0, 3.0
TICKS_PER_FRAME = SAMPLES_PER_FRAME // TICK


@lru_cache(maxsize=1)
def _mel_constants() -> tuple[np.ndarray, np.ndarray]:
    return np.hanning(WINDOW + 1)[:-1], _mel_filters(MELS, N_FFT // 2 + 1, 60.0, 7600.0)


def log_mels(pcm: np.ndarray) -> np.ndarray:
    """pcm float32 [400 + 160 n] -> [n + 1, 40], one row per tick of 10 ms.

    Tick m is centred on sample 200 + 160 m: 25 ms Hann window, power spectrum (n_fft 512), 40 HTK mels in 60..7600 Hz,
    (log(x + 1e-5) + 6) / 3.
    """
    hann, filters = _mel_constants()
    ticks = np.lib.stride_tricks.sliding_window_view(pcm, WINDOW)[::TICK]
    power = np.abs(np.fft.rfft(ticks * hann, N_FFT)) ** 2
    return (np.log(power @ filters + 1e-5) - MEL_MEAN) / MEL_STD


def _samples_of(first: int, last: int) -> tuple[int, int]:
    """Absolute samples [start, stop) of ticks first to last."""
    return first * TICK - WINDOW // 2, last * TICK + WINDOW // 2


class LogMelFrontEnd(_Streaming):
    """Log-mel features: 400 numbers per picture (10 steps of 20 ms x 40 mels), -80..+110 ms around its start.

    Picture i averages the ticks (log_mels) 4i-8 .. 4i+11 in consecutive pairs. The last tick of a block ends 1320 samples
    (82.5 ms) after it: that is the look-ahead.
    """

    TICKS_BEFORE, TICKS_AFTER = 8, 12  # of one picture, around its first tick

    def __init__(self, block_frames: int = BLOCK_FRAMES):
        self.block_frames = block_frames
        self.layers = 1
        self.steps = (self.TICKS_BEFORE + self.TICKS_AFTER) // 2  # of 20 ms, per picture
        self.width = self.steps * MELS
        self.lookahead_samples = self.span(0)[1] - block_frames * SAMPLES_PER_FRAME

    def span(self, block: int) -> tuple[int, int]:
        """Absolute samples [start, stop) the block's features are made of."""
        first = TICKS_PER_FRAME * self.block_frames * block
        return _samples_of(first - self.TICKS_BEFORE, first + TICKS_PER_FRAME * (self.block_frames - 1) + self.TICKS_AFTER - 1)

    def encode(self, window: np.ndarray, block: int) -> torch.Tensor:
        """window: float32 PCM of span(block) -> float32 [1, 400, block_frames]. Depends on the window alone."""
        pairs = log_mels(window).reshape(-1, 2, MELS).mean(axis=1)
        pictures = [pairs[2 * j : 2 * j + self.steps].reshape(-1) for j in range(self.block_frames)]
        return torch.from_numpy(np.stack(pictures, axis=-1).astype(np.float32))[None]


class VisemeFrontEnd(_Streaming):
    """What a mouth does at every picture: the eight articulators of visemes.yaml, by the network that comes with an avatar.

    For a picture it hears `reach - ahead` ticks of 10 ms before its moment and `ahead` after; with 11 the look-ahead is that of LogMelFrontEnd.
    """

    def __init__(self, encoder: VisemeEncoder, block_frames: int = BLOCK_FRAMES):
        """encoder: float32, on the CPU."""
        self._encoder, self.block_frames = encoder.eval(), block_frames
        self.layers, self.width = 1, ARTICULATORS
        self.lookahead_samples = max(0, self.span(0)[1] - block_frames * SAMPLES_PER_FRAME)

    def span(self, block: int) -> tuple[int, int]:
        """Absolute samples [start, stop) the block's features are made of."""
        sizes, first = self._encoder.sizes, TICKS_PER_FRAME * self.block_frames * block
        return _samples_of(first - sizes.reach + sizes.ahead, first + TICKS_PER_FRAME * (self.block_frames - 1) + sizes.ahead)

    @torch.no_grad()
    def encode(self, window: np.ndarray, block: int) -> torch.Tensor:
        """window: float32 PCM of span(block) -> float32 [1, 8, block_frames]. Depends on the window alone."""
        mels = torch.from_numpy(log_mels(window).astype(np.float32).T)
        return self._encoder(mels[None])[..., ::TICKS_PER_FRAME].contiguous()


class MoonshineFrontEnd(_Streaming):
    """What a mouth does at every picture, by the first layers of a recogniser. A block hears about a second before it, and 100 ms after it."""

    def __init__(self, encoder: MoonshineVisemes, block_frames: int = BLOCK_FRAMES):
        """encoder: float32, on the CPU."""
        self._encoder, self.block_frames = encoder.eval(), block_frames
        self.layers, self.width = 1, ARTICULATORS
        self.lookahead_samples = self.span(0)[1] - block_frames * SAMPLES_PER_FRAME

    def span(self, block: int) -> tuple[int, int]:
        """Absolute samples [start, stop) the block's features are made of."""
        before, after = self._encoder.sizes.margins(self.block_frames)
        first = SAMPLES_PER_FRAME * self.block_frames * block
        return first - before, first + after

    @torch.no_grad()
    def encode(self, window: np.ndarray, block: int) -> torch.Tensor:
        """window: float32 PCM of span(block) -> float32 [1, 8, block_frames]. Depends on the window alone."""
        return self._encoder(torch.from_numpy(window)[None], self.block_frames)


def viseme_front_end(encoder: VisemeEncoder | MoonshineVisemes, block_frames: int = BLOCK_FRAMES) -> VisemeFrontEnd | MoonshineFrontEnd:
    """The one through which this network hears."""
    return (MoonshineFrontEnd if isinstance(encoder, MoonshineVisemes) else VisemeFrontEnd)(encoder, block_frames)


# ---------------------------------------------------------------- wav2vec2: the time base
# Three rates: 50 Hz rows of the model, 30 Hz rows of the reference, 25 pictures per second.

CELL = SAMPLE_RATE // 10  # 0.1 s: the shortest time that is whole at 16 kHz, 50 Hz and 30 Hz
CELL_ROWS = 3  # rows of 30 Hz in it
RECEPTIVE, STRIDE = 400, 320  # samples of wav2vec2's first row, and from row to row
WAV2VEC_LOOKAHEAD = 15_360  # samples, 0.96 s, unless a checkpoint says otherwise; why: Wav2VecFrontEnd


def rows_50hz(samples: int) -> int:
    """Rows wav2vec2 makes of so many samples."""
    return max(0, (samples - RECEPTIVE) // STRIDE + 1)


def rows_30hz(rows50: int) -> int:
    """Rows of the reference's 30 Hz grid; in binary64, so it is one less than 3/5 for 205, 410, 820, ..."""
    return int(rows50 / 50.0 * 30)


def frame_to_row(frame: int) -> int:
    """The 30 Hz row picture `frame` takes."""
    return (12 * frame + 5) // 10


def interpolate_rows(features: torch.Tensor, rows: int) -> torch.Tensor:
    """features [layers, T, width] -> [layers, rows, width], linear in time, first and last row of both aligned."""
    low, high, weight = _between(features.shape[1] - 1, rows, features.dtype, features.device)
    return torch.lerp(features[:, low], features[:, high], weight)


@lru_cache(maxsize=4)  # a stream's window is always as long
def _between(last: int, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each of `rows`: the rows 0..last before and after it, and how near it is to the second [1, rows, 1]."""
    with torch.inference_mode(False):  # others may ask for gradients later
        at = torch.linspace(0.0, float(last), rows, dtype=torch.float64)
        low = at.floor().long()
        weight = (at - low).to(dtype)[None, :, None]
        return low.to(device), (low + 1).clamp(max=last).to(device), weight.to(device)


@lru_cache(maxsize=16)  # a stream has 5 of them, again and again
def _index(rows: tuple[int, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.long, device=device)


def rows_to_frames(features: torch.Tensor, frames: int) -> torch.Tensor:
    """30 Hz features [layers, T, width] -> [layers, width, frames] at 25 per second; zeros past the end."""
    result = features.new_zeros(features.shape[0], features.shape[2], frames)
    index = torch.tensor([r for r in map(frame_to_row, range(frames)) if r < features.shape[1]], dtype=torch.long)
    result[..., : len(index)] = features[:, index].transpose(1, 2)
    return result


class Wav2VecFrontEnd(_Streaming):
    """All hidden states of a wav2vec2 encoder, over a window that slides with the blocks.

    The window has window_samples = 400 + 1600 k samples, so its 5k+1 rows of 50 Hz become exactly
    3k+1 rows of 30 Hz, and starts on the absolute 0.1 s grid, so these are rows of one global 30 Hz
    grid that picture numbers index. It ends at most `lookahead` samples after the block. PCM is
    normalised over the window; before the stream there is silence.

    The default holds the 2 s of left context and the 0.96 s of look-ahead of which model.md section
    9 quotes measurements. Look-ahead is latency: live use may trade it for a poorer match to the
    whole-file features the weights were trained with; at least 1040 samples are needed, so that the
    window's end on the grid covers the last picture. How close a rolling window comes to whole-file
    features is a property of the trained encoder; nothing here bounds it.
    """

    def __init__(
        self, model, window_samples: int = 54_800, lookahead_samples: int = WAV2VEC_LOOKAHEAD, block_frames: int = BLOCK_FRAMES
    ):
        """model: a transformers Wav2Vec2Model in eval mode. Raises ConfigError on a window that cannot serve."""
        cells, rest = divmod(window_samples - RECEPTIVE, CELL)
        if rest or cells < 1:
            raise ConfigError(f"audio.window_samples={window_samples}: must be {RECEPTIVE} + {CELL} k, such as 32400")
        self._model, self._cells = model.eval(), cells
        self.block_frames, self.lookahead_samples = block_frames, lookahead_samples
        self.layers = model.config.num_hidden_layers + 1
        self.width = model.config.hidden_size
        self._check_cover(window_samples)

    def _check_cover(self, window_samples: int) -> None:
        """Every picture's row must lie inside its block's window; the pattern repeats after 5 blocks."""
        ahead = self.lookahead_samples
        for block in range(5):
            rows = self._rows(block)
            if rows[-1] > CELL_ROWS * self._cells:
                raise ConfigError(f"audio.lookahead_samples={ahead}: too short for the last picture: 1040 is enough")
            if rows[0] < 0:
                raise ConfigError(f"audio.window_samples={window_samples}: shorter than a block + look-ahead {ahead}")

    def _first_cell(self, block: int) -> int:
        """Index on the 0.1 s grid at which the block's window starts."""
        ready = (block + 1) * self.block_frames * SAMPLES_PER_FRAME + self.lookahead_samples
        return (ready - RECEPTIVE) // CELL - self._cells

    def _rows(self, block: int) -> list[int]:
        """The window's 30 Hz row of each picture of the block."""
        first, origin = block * self.block_frames, CELL_ROWS * self._first_cell(block)
        return [frame_to_row(first + j) - origin for j in range(self.block_frames)]

    def span(self, block: int) -> tuple[int, int]:
        """Absolute samples [start, stop) of the block's window."""
        start = CELL * self._first_cell(block)
        return start, start + CELL * self._cells + RECEPTIVE

    def encode(self, window: np.ndarray, block: int) -> torch.Tensor:
        """window: float32 PCM of span(block) -> float32 [layers, width, block_frames], on the model's device."""
        rows = interpolate_rows(self.hidden_states(window), CELL_ROWS * self._cells + 1)
        return rows[:, _index(tuple(self._rows(block)), rows.device)].transpose(1, 2).contiguous()

    def whole_file(self, pcm, frames: int) -> torch.Tensor:
        """The reference's offline features, for parity: pcm float32 [n] encoded at once -> [layers, width, frames].

        Both ends of the 50 and 30 Hz grids are aligned over the file, so time is stretched by up to 2
        rows of 50 Hz at its end; pictures past the end are zeros.
        """
        pcm = np.asarray(pcm)
        rows = rows_30hz(rows_50hz(len(pcm)))
        if not rows:
            return torch.zeros(self.layers, self.width, frames)
        return rows_to_frames(interpolate_rows(self.hidden_states(pcm), rows), frames)

    @torch.no_grad()
    def hidden_states(self, pcm: np.ndarray) -> torch.Tensor:
        """pcm: float32 [n], n >= 400 -> float32 [layers, T50, width]: embedding output and every layer's.

        PCM is normalised over n. The last state is taken after the encoder's final LayerNorm, which
        transformers 5 leaves out of `hidden_states`.
        """
        weight = next(self._model.parameters())
        values = torch.from_numpy((pcm - pcm.mean(dtype=np.float64)) / np.sqrt(pcm.var(dtype=np.float64) + 1e-7))
        out = self._model(to_device(values[None].to(weight.dtype), weight.device), output_hidden_states=True)
        return torch.cat([*out.hidden_states[:-1], out.last_hidden_state]).float()


# ---------------------------------------------------------------- the door


def build_front_end(config: Mapping, hearing=None) -> AudioFrontEnd:
    """The front end a checkpoint's "audio" section names: {"kind": "log_mel" | "visemes" | "wav2vec2", options...}.

    hearing: the network that the kind needs (models.weights.load_hearing). Options are the keyword arguments of what makes it.
    Raises ConfigError on an unknown kind or option.
    """
    options = dict(config)
    kind = options.pop("kind", None)
    kinds = {"log_mel": LogMelFrontEnd, "visemes": viseme_front_end, "wav2vec2": Wav2VecFrontEnd}
    if kind not in kinds:
        raise ConfigError(f"audio.kind={kind!r}: must be one of {', '.join(kinds)}")
    known = [name for name in inspect.signature(kinds[kind]).parameters if name not in ("model", "encoder")]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"audio.{name}: unknown for kind {kind}; {hint}")
    if kind == "log_mel":
        return LogMelFrontEnd(**options)
    if hearing is None:
        raise ConfigError(f"audio.kind={kind!r}: the checkpoint holds no {'wav2vec2' if kind == 'wav2vec2' else 'viseme_encoder'} folder")
    return kinds[kind](hearing, **options)
