"""`liveavatar talk`: hold a conversation with an avatar on this machine, from recordings, typed lines or a terminal, into an mp4.

Everything heavy is imported inside the command.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from liveavatar.serving.conversation import Exchange
    from liveavatar.serving.rehearsal import Rehearsed, Turn
    from liveavatar.serving.settings import ServeConfig
    from liveavatar.serving.talk import Talk

PORTRAIT = Path(__file__).parents[1] / "assets" / "portrait.png"
MIND_KEY, VOICE_KEY, EARS_KEY = "LIVEAVATAR_MIND_KEY", "LIVEAVATAR_VOICE_KEY", "LIVEAVATAR_EARS_KEY"  # environment: keys are no arguments
USUAL = ("engine.runtime.launcher=local", "media.scale=3")  # without a config: the embedded avatar in a process of its own, 384 px
EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "liveavatar talk --say 'Hello. What can you do?' --out answer.mp4   [dim]no key, no network, no sound card[/dim]\n\n"
    "liveavatar talk --audio question.wav --audio another.wav --barge-in 1.5 --out talk.mp4   [dim]the second interrupts the answer to the first[/dim]\n\n"
    "liveavatar talk --audio question.wav --mind http://127.0.0.1:11434/v1 --model llama3.2   [dim]a language model of yours answers[/dim]"
)  # fmt: skip


def register(app: typer.Typer, guard: Callable) -> None:
    """Add `talk` to `app`. guard: makes of a function one whose LiveAvatarErrors are a line on stderr."""
    app.command(epilog=EPILOG)(guard(talk))


def talk(
    overrides: Annotated[Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file, e.g. engine_kind=testcard media.scale=2.")] = None,
    audio: Annotated[Optional[list[Path]], typer.Option("--audio", "-a", metavar="FILE", help="A question, whatever ffmpeg reads; may be given often: turn after turn.")] = None,
    say: Annotated[Optional[list[str]], typer.Option("--say", "-s", metavar="TEXT", help="A question in writing; may be given often, asked after those of --audio.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.mp4", help="What a viewer sees and hears.")] = Path("talk.mp4"),
    barge_in: Annotated[Optional[float], typer.Option(min=0.0, metavar="SECONDS", help="Each further question comes so long after the answer before it began, instead of after its end.")] = None,
    image: Annotated[Optional[Path], typer.Option("--image", "-i", metavar="FILE", help="Portrait. Default: the embedded one.")] = None,
    config: Annotated[Optional[Path], typer.Option("--config", "-c", metavar="FILE", help="YAML file of a server. Default: the embedded avatar on this machine.")] = None,
    mind: Annotated[Optional[str], typer.Option("--mind", metavar="URL", help=f"Who answers: an OpenAI-compatible server; its key in ${MIND_KEY}. Default: a small companion of rules, no language model.")] = None,
    model: Annotated[str, typer.Option("--model", help="Its model.")] = "gpt-4o-mini",
    voice: Annotated[str, typer.Option("--voice", metavar="hibari|flite|URL", help=f"Local voices, or an OpenAI-compatible server; its key in ${VOICE_KEY}.")] = "hibari",
    ears: Annotated[Optional[str], typer.Option("--ears", metavar="URL|FOLDER", help=f"Who recognises: an OpenAI-compatible server (key in ${EARS_KEY}) or a CTranslate2 Whisper folder. Default: Whisper tiny.en, English.")] = None,
    only_avatar: Annotated[bool, typer.Option("--only-avatar", help="Leave the questions out of the sound of the file.")] = False,
    report: Annotated[Optional[Path], typer.Option("--report", metavar="FILE.json", help="Also write turns, what was heard of them and their times.")] = None,
) -> None:
    """Talk with the avatar: speech in, answer out, turn after turn, with interruptions; without --audio and --say line by line from the terminal."""
    import asyncio

    from liveavatar.config import load
    from liveavatar.serving.ears import Ears, open_recogniser
    from liveavatar.serving.minds import open_mind
    from liveavatar.serving.rehearsal import recorded_turns
    from liveavatar.serving.settings import ServeConfig

    settings = load(config, [*(() if config else USUAL), *(overrides or ())], ServeConfig)
    turns = recorded_turns(audio or (), say or (), barge_in)
    parts = {"mind": open_mind(mind, model=model, key=os.environ.get(MIND_KEY)), "voice": _voice(voice)}
    if audio:  # what is typed needs no ears
        parts |= {"ears": Ears(), "recogniser": open_recogniser(ears, key=os.environ.get(EARS_KEY))}
    done = asyncio.run(_held(settings, image, turns, parts, out, not only_avatar))
    if report is not None:
        report.write_text(json.dumps(_figures(done), indent=1) + "\n", encoding="utf-8")
    typer.echo(f"{out}: {done.ticks / 25:.1f} s, {done.kinds.get('filler', 0)} filled and {done.late} late of {done.ticks} pictures")


def _voice(name: str):
    from liveavatar.serving.voices import voice_named

    return voice_named("openai", url=name, key=os.environ.get(VOICE_KEY)) if "://" in name else voice_named(name)


async def _held(settings: ServeConfig, image: Path | None, turns: list[Turn], parts: dict, out: Path, both: bool) -> Rehearsed:
    from liveavatar.serving.rehearsal import rehearse
    from liveavatar.serving.role import Role
    from liveavatar.serving.server import marker
    from liveavatar.serving.studio import Studio
    from liveavatar.serving.talk import Talk

    studio = Studio(settings, marker=marker(settings))
    try:
        await studio.start()
        avatar = await studio.open(Role(avatar="talk", picture=image or PORTRAIT, prompt=settings.engine.prompt, seed=settings.engine.seed))
        async with Talk(avatar, tell=_tell, **parts) as conversation:
            return await rehearse(avatar, conversation, _user(conversation, turns), out, both=both)
    finally:
        await studio.aclose()


def _tell(name: str, data: dict) -> None:
    match name:
        case "talk.question":
            typer.echo(f"you:    {data['text']}")
        case "talk.answer":
            typer.echo(f"avatar: {data['text']}{' ... (interrupted)' if data['cut'] else ''}")
        case "talk.latency":
            typer.echo(f"        {', '.join(f'{key} {value:.2f} s' for key, value in data.items() if key not in ('turn', 'over'))}")
        case "talk.failed":
            typer.echo(f"failed: {data['reason']}", err=True)


def _user(conversation: Talk, turns: list[Turn]):
    """Who says the turns; without any, whoever types at the terminal."""
    from liveavatar.serving.rehearsal import Typist, User

    if turns:
        return User(conversation.conversation, turns)
    typer.echo("Type what you say, one line a turn; an empty line ends. A line while the avatar speaks interrupts it.")
    return Typist(conversation.conversation, typer.get_text_stream("stdin"))


def _figures(done: Rehearsed) -> dict:
    def figures(exchange: Exchange) -> dict:
        return {"question": exchange.question, "answer": exchange.answer, "cut": exchange.cut, "seconds_after_question": exchange.latency}

    return {"turns": [figures(exchange) for exchange in done.exchanges], "pictures": done.ticks, "late": done.late, "lost": done.lost, "kinds": done.kinds}
