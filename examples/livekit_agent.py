"""A LiveKit agent with a face, in one file.

    pip install ./plugins/livekit-plugins-liveavatar livekit-plugins-openai
    export LIVEKIT_URL=wss://... LIVEKIT_API_KEY=... LIVEKIT_API_SECRET=... OPENAI_API_KEY=...
    export LIVEAVATAR_URL=https://avatar.example.com LIVEAVATAR_API_KEY=la_...
    python examples/livekit_agent.py dev

Any speech recognition, model and voice of LiveKit do; `base_url=` points those used here at a server of your own.
"""

from livekit.agents import Agent, AgentServer, AgentSession, JobContext, cli
from livekit.plugins import liveavatar, openai

server = AgentServer()


@server.rtc_session()
async def talk(ctx: JobContext) -> None:
    """One room: somebody to talk to."""
    cannot_pause = {"interruption": {"resume_false_interruption": False}}
    session = AgentSession(stt=openai.STT(), llm=openai.LLM(), tts=openai.TTS(), turn_handling=cannot_pause)
    await liveavatar.AvatarSession(avatar_id="default").start(session, room=ctx.room)
    await session.start(Agent(instructions="You are a friendly host. Answer in one or two short sentences."), room=ctx.room)
    await session.generate_reply(instructions="Greet the person and ask what brings them here.")


if __name__ == "__main__":
    cli.run_app(server)
