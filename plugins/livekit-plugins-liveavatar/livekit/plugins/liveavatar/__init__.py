"""LiveKit Agents plugin: an agent speaks through a liveavatar server, or through an avatar in its own process.

    avatar = liveavatar.AvatarSession(avatar_id="default")      # LIVEAVATAR_URL, LIVEAVATAR_API_KEY, LIVEKIT_*
    await avatar.start(session, room=ctx.room)
"""

from livekit.agents import Plugin

from .avatar import AvatarSession, LiveAvatarException
from .local import LocalAvatarSession
from .log import logger
from .version import __version__

__all__ = ["AvatarSession", "LiveAvatarException", "LocalAvatarSession", "__version__"]


class LiveAvatarPlugin(Plugin):
    """Makes the package known to livekit-agents."""

    def __init__(self):
        super().__init__(__name__, __version__, __package__, logger)


Plugin.register_plugin(LiveAvatarPlugin())
