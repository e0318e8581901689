"""What travels of channels over HTTP, as JSON; see wire.py. Times are Unix seconds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from liveavatar.serving.channels import MODE, Entry, Filler, Schedule
from liveavatar.serving.outputs import MOST
from liveavatar.serving.wire import TEXT, Mode, OutputWish, Prompt, WebhookWish, Wire, Word

DAY = 86_400.0
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, StringConstraints(pattern=NAME)]
ChannelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Seconds = Annotated[float, Field(ge=0, le=DAY, allow_inf_nan=False)]


class EntryBody(Wire):
    """One thing to be said. text: by the server's voice; or sound: id of one that was uploaded to the channel. prompt: while it lasts.

    at: when; left out: when its turn in the list comes. every: seconds to its next time.
    """

    name: Name
    text: Annotated[str, StringConstraints(min_length=1, max_length=TEXT, strip_whitespace=True)] | None = None
    sound: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")] | None = None
    prompt: Prompt | None = None
    at: Annotated[float, Field(ge=0, lt=1e11, allow_inf_nan=False)] | None = None
    every: Annotated[float, Field(ge=1, le=366 * DAY, allow_inf_nan=False)] | None = None


class ScheduleBody(Wire):
    """Entries without `at` in the order of the list, with `loop` again and again, gap_seconds apart; one with `at` at its time or after
    what is on air then, but not more than late_seconds later."""

    entries: Annotated[list[EntryBody], Field(max_length=200)] = []
    loop: bool = True
    gap_seconds: Seconds = 0.0
    late_seconds: Seconds = 60.0

    def plain(self) -> Schedule:
        """Raises Unprocessable."""
        entries = tuple(Entry(**entry.model_dump()) for entry in self.entries)
        return Schedule(entries=entries, loop=self.loop, gap_seconds=self.gap_seconds, late_seconds=self.late_seconds)

    @classmethod
    def of(cls, schedule: Schedule) -> ScheduleBody:
        """The same on the wire."""
        return cls.model_validate(asdict(schedule))


class FillerBody(Wire):
    """Between two entries the face goes on moving; prompts: one after the other, `seconds` each."""

    prompts: Annotated[list[Prompt], Field(max_length=20)] = []
    seconds: Annotated[float, Field(ge=1, le=DAY, allow_inf_nan=False)] = 30.0

    def plain(self) -> Filler:
        return Filler(prompts=tuple(self.prompts), seconds=self.seconds)


class ChannelOutputWish(OutputWish):
    """As of a session. name: by default its kind; two of a channel have different ones."""

    name: Name | None = None


Outputs = Annotated[list[ChannelOutputWish], Field(max_length=MOST)]


class ChannelWish(Wire):
    """Body of POST /v1/channels. Sounds are uploaded to a channel that is there, so entries that name one come later, by PATCH."""

    name: ChannelName
    avatar_id: Word = "default"
    mode: Mode = MODE
    prompt: Prompt = ""
    schedule: ScheduleBody = ScheduleBody()
    filler: FillerBody = FillerBody()
    outputs: Outputs = []
    webhook: WebhookWish | None = None


class ChannelChange(Wire):
    """Body of PATCH: what is left out stays. outputs: all of them; one that is there needs only its name and kind, keeps its key, and is not
    interrupted. webhook: null removes it."""

    avatar_id: Word | None = None
    mode: Mode | None = None
    prompt: Prompt | None = None
    schedule: ScheduleBody | None = None
    filler: FillerBody | None = None
    outputs: Outputs | None = None
    webhook: WebhookWish | None = None


class SwitchWish(Wire):
    """Body of :switch. entry: what is said next. cut: what is being said ends now."""

    avatar_id: Word | None = None
    prompt: Prompt | None = None
    schedule: ScheduleBody | None = None
    filler: FillerBody | None = None
    entry: Name | None = None
    cut: bool = False


class SoundView(Wire):
    """A sound that entries may name."""

    id: str
    seconds: float
    bytes: int


class NextView(Wire):
    """entry: its name. at: when, if nothing else is being said then."""

    entry: str
    at: float


class ChannelOutputView(Wire):
    """url: server and application alone. state: off, or as of a session's output; refused ones and those of a channel that waits: waiting."""

    name: str
    kind: str
    url: str | None
    state: str
    reconnects: int = 0
    failures: int = 0
    last_error: str | None = None
    bytes: int = 0
    drops: int = 0
    links: dict[str, str] = {}


class ChannelView(Wire):
    """state: off, waiting (it should be on air, see last_error), on_air. session_id: of its session; a new one after each restart, counted in
    `sessions`. on_air_since: of that session. webhook: server of its address. entry: what is being said; None: nothing is."""

    name: str
    owner: str
    avatar_id: str
    mode: str
    prompt: str
    schedule: ScheduleBody
    filler: FillerBody
    outputs: list[ChannelOutputView]
    webhook: str | None
    sounds: list[SoundView]
    state: Literal["off", "waiting", "on_air"]
    session_id: str | None
    on_air_since: float | None
    sessions: int
    entry: str | None
    next: NextView | None
    last_error: str | None
    created_at: float
    links: dict[str, str]


class ChannelList(Wire):
    channels: list[ChannelView]
