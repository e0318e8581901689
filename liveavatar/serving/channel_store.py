"""Channels of one server on the disk: a folder for each, whole or not there, private, for it holds stream keys."""

from __future__ import annotations

import io
import json
import re
import secrets
import wave
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from liveavatar.serving.channels import Channel, Progress, SoundFile
from liveavatar.serving.durable import erase_folder, flush_folder, private_folder, read_record, replace_file, sweep, whole_folder
from liveavatar.serving.problems import Conflict, NotFound, RateLimited

MOST = 32  # channels of one owner
SOUND_BYTES = 500_000_000  # of all sounds of one channel
CHANNEL_ID = re.compile(r"[0-9a-f]{32}")


class ChannelStore:
    """folder/ID/{channel.json, progress.json, sounds/ID.wav}. A name from a client never becomes a path before it was looked up.

    Everything but `all`, `get` and `now` blocks on the disk. Raises ConfigError for files that are not what they were.
    """

    def __init__(self, folder: Path):
        self._folder = private_folder(folder)
        sweep(self._folder)
        homes = sorted(path for path in self._folder.iterdir() if CHANNEL_ID.fullmatch(path.name))
        self._channels = {home.name: read_record(Channel, home / "channel.json") for home in homes}

    def all(self, sees: Callable[[str], bool] = lambda owner: True) -> list[Channel]:
        """Those whose owner is seen, by owner and name."""
        return sorted((one for one in tuple(self._channels.values()) if sees(one.owner)), key=lambda one: (one.owner, one.name))

    def get(self, owner: str, name: str) -> Channel:
        """The one of this name. Raises NotFound."""
        for channel in self.all(lambda other: other == owner):
            if channel.name == name:
                return channel
        raise NotFound(f"no channel {name!r}")

    def now(self, channel_id: str) -> Channel:
        """As it is now. Raises NotFound for one that was erased."""
        try:
            return self._channels[channel_id]
        except KeyError:
            raise NotFound("the channel was erased") from None

    def add(self, channel: Channel) -> None:
        """Raises Conflict for a name its owner has already, RateLimited for too many."""
        mine = [other.name for other in self.all(lambda owner: owner == channel.owner)]
        if channel.name in mine:
            raise Conflict(f"there is a channel {channel.name!r}")
        if len(mine) >= MOST:
            raise RateLimited(f"at most {MOST} channels of one owner", kind="quota")
        with whole_folder(self._folder / channel.id) as folder:
            replace_file(folder / "channel.json", _json(channel))
        self._channels[channel.id] = channel

    def put(self, channel: Channel) -> None:
        """In place of what it was. Raises NotFound."""
        self.now(channel.id)
        replace_file(self._folder / channel.id / "channel.json", _json(channel))
        self._channels[channel.id] = channel

    def erase(self, channel_id: str) -> None:
        """With its sounds. Raises NotFound."""
        self.now(channel_id)
        del self._channels[channel_id]
        erase_folder(self._folder / channel_id)

    # ------------------------------------------------------------ how far it is

    def progress(self, channel_id: str) -> Progress:
        """What was said of it so far."""
        file = self._folder / channel_id / "progress.json"
        return read_record(Progress, file) if file.exists() else Progress()

    def keep(self, channel_id: str, progress: Progress) -> None:
        """Raises OSError."""
        replace_file(self._folder / channel_id / "progress.json", _json(progress))

    # ------------------------------------------------------------ sounds

    def add_sound(self, channel_id: str, pcm: np.ndarray, rate: int) -> SoundFile:
        """pcm: int16 or float32 [n] mono, at `rate` Hz. Raises RateLimited where the channel has too many."""
        channel, data = self.now(channel_id), _wav(pcm, rate)
        if sum(sound.bytes for sound in channel.sounds) + len(data) > SOUND_BYTES:
            raise RateLimited(f"at most {SOUND_BYTES} bytes of sounds in a channel", kind="quota")
        sound = SoundFile(id=secrets.token_hex(16), seconds=len(pcm) / rate, bytes=len(data))
        replace_file(self._sound(channel_id, sound.id), data)
        self.put(replace(channel, sounds=(*channel.sounds, sound)))
        return sound

    def sound(self, channel_id: str, sound_id: str) -> tuple[np.ndarray, int]:
        """int16 [n] mono and its Hz. Raises NotFound for a file that is gone or damaged."""
        try:
            with wave.open(str(self._sound(channel_id, sound_id))) as file:
                return np.frombuffer(file.readframes(file.getnframes()), "<i2"), file.getframerate()
        except (OSError, EOFError, wave.Error) as error:
            raise NotFound(f"the sound cannot be read ({type(error).__name__}): upload it again") from None

    def erase_sound(self, channel_id: str, sound_id: str) -> None:
        """Raises NotFound; Unprocessable while an entry names it."""
        channel = self.now(channel_id)
        kept = tuple(sound for sound in channel.sounds if sound.id != sound_id)
        if len(kept) == len(channel.sounds):
            raise NotFound("no such sound")
        self.put(replace(channel, sounds=kept))
        self._sound(channel_id, sound_id).unlink(missing_ok=True)
        flush_folder(self._sound(channel_id, sound_id).parent)

    def _sound(self, channel_id: str, sound_id: str) -> Path:
        return private_folder(self._folder / channel_id / "sounds") / f"{sound_id}.wav"


def _wav(pcm: np.ndarray, rate: int) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(rate)
        file.writeframes((pcm if pcm.dtype == np.int16 else np.rint(np.clip(pcm, -1, 1) * 32767)).astype("<i2").tobytes())
    return out.getvalue()


def _json(value: Channel | Progress) -> bytes:
    return json.dumps(asdict(value), indent=1).encode()
