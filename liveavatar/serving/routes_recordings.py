"""/v1/recordings: what was recorded, with its side-car (REC-4). The mp4 carries its own C2PA manifest."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path as File
from typing import Annotated

from fastapi import APIRouter, Path, Response
from fastapi.responses import FileResponse

from liveavatar.serving.access import CONTROL, VIEW, Principal
from liveavatar.serving.durable import flush_folder
from liveavatar.serving.problems import NotFound
from liveavatar.serving.services import BEARER, At, Services, Who
from liveavatar.serving.wire import RecordingList, RecordingView, problems

router = APIRouter(prefix="/v1/recordings", tags=["outputs"], dependencies=[BEARER])
RecordingId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]
SHOWN = ("session", "owner", "avatar", "consent", "began", "seconds", "bytes", "sha256", "signed", "segments", "epochs")


def view(file: File) -> RecordingView | None:
    """Of a side-car; None for a recording that is not finished, not there, or erased just now. Blocks on the disk."""
    try:
        facts = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    if not file.with_suffix(".mp4").exists():
        return None
    home = f"/v1/recordings/{file.stem}"
    shown = {name: facts.get(name) for name in SHOWN}
    return RecordingView(id=file.stem, whole=facts["complete"], **shown, links={"self": home, "file": f"{home}/file"})


def _folder(at: Services) -> File:
    return File(at.settings.storage.folder) / "recordings"


def _all(at: Services) -> list[RecordingView]:
    views = [found for file in _folder(at).glob("*.json") if (found := view(file)) is not None]
    return sorted(views, key=lambda found: found.began or "", reverse=True)


async def _found(recording_id: str, who: Principal, at: Services) -> RecordingView:
    who.need_key()
    found = await asyncio.to_thread(view, _folder(at) / f"{recording_id}.json")
    if found is None or not who.sees(found.owner or ""):
        raise NotFound("no such recording")
    who.need(VIEW, CONTROL)
    return found


@router.get("", response_model=RecordingList, responses=problems(403))
async def list_recordings(who: Who, at: At) -> RecordingList:
    """The asker's finished recordings, the newest first."""
    who.need_key(VIEW, CONTROL)
    return RecordingList(recordings=[found for found in await asyncio.to_thread(_all, at) if who.sees(found.owner or "")])


@router.get("/{recording_id}", response_model=RecordingView, responses=problems(403, 404))
async def get_recording(recording_id: RecordingId, who: Who, at: At) -> RecordingView:
    """One: whose session, which segments, its hash."""
    return await _found(recording_id, who, at)


@router.get("/{recording_id}/file", response_class=FileResponse, responses=problems(403, 404))
async def get_file(recording_id: RecordingId, who: Who, at: At) -> FileResponse:
    """The mp4."""
    found = await _found(recording_id, who, at)
    return FileResponse(_folder(at) / f"{found.id}.mp4", media_type="video/mp4", filename=f"{found.id}.mp4")


@router.delete("/{recording_id}", status_code=204, responses=problems(403, 404))
async def erase_recording(recording_id: RecordingId, who: Who, at: At) -> Response:
    """Gone for good."""
    found = await _found(recording_id, who, at)
    who.need(CONTROL)
    await asyncio.to_thread(_erase, _folder(at) / f"{found.id}.mp4")
    at.audit.note("recording.erased", {"recording": found.id, "sha256": found.sha256, "by": who.key})
    return Response(status_code=204)


def _erase(path: File) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".json").unlink(missing_ok=True)
    flush_folder(path.parent)
