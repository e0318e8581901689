"""Who a session shows, and what the text that goes with the picture says of them."""

from __future__ import annotations

from dataclasses import dataclass, field

EMOTION, LISTENING = "The person looks {}.", "The person listens attentively, lips closed."


@dataclass(frozen=True, kw_only=True)
class Role:
    """What an engine session is opened with, again after the chain died.

    avatar: its id. picture: path, bytes, uint8 [3, H, W] or a Fitted. emotion: how the person looks, a word or two; "": as it comes. listening:
    somebody is speaking to the avatar. seed: of the noise. owner: who opened the session.
    """

    avatar: str
    picture: object
    prompt: str = ""
    emotion: str = ""
    listening: bool = False
    seed: int = 0
    owner: str = ""
    metadata: dict = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What the model reads: the prompt, and a sentence for each of the two where they say something."""
        added = [EMOTION.format(self.emotion)] * bool(self.emotion) + [LISTENING] * self.listening
        said = self.prompt.rstrip()
        if added and said and said[-1] not in ".!?":
            said += "."
        return " ".join(filter(None, (said, *added))) if added else self.prompt
