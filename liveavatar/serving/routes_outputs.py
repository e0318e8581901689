"""/v1/sessions/{id}/outputs: destinations and recordings of a session."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response
from fastapi.responses import FileResponse, JSONResponse

from liveavatar.serving.access import CONTROL, VIEW
from liveavatar.serving.outputs import Output, wanted
from liveavatar.serving.routes_sessions import SessionId
from liveavatar.serving.services import BEARER, At, OnceKey, Who
from liveavatar.serving.wire import OutputList, OutputView, OutputWish, problems

router = APIRouter(prefix="/v1/sessions/{session_id}/outputs", tags=["outputs"], dependencies=[BEARER])
OutputId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$")]
FileName = Annotated[str, Path(pattern=r"^[0-9A-Za-z.-]{1,64}$")]


def view(session_id: str, output: Output) -> OutputView:
    """How it does. Neither key nor token is in it."""
    status, home = output.status, f"/v1/sessions/{session_id}/outputs/{output.id}"
    return OutputView(id=output.id, name=output.name, kind=output.kind, url=status.url or None,
                      state="closed" if output.task.done() else status.state, reconnects=status.reconnects, failures=status.failures,
                      last_error=status.last_error, bytes=status.bytes, drops=status.drops,
                      links={"self": home, **({"playlist": f"{home}/hls/index.m3u8"} if output.folder else {})})  # fmt: skip


@router.post("", status_code=201, response_model=OutputView, responses=problems(400, 403, 404, 409, 413))
async def add_output(session_id: SessionId, wish: OutputWish, who: Who, at: At, once: OnceKey = None) -> Response:
    """Send the session to an RTMP or WHIP server, into an HLS playlist, or into a recording."""
    lease, want = at.desk.running(who, session_id, CONTROL), wanted(wish)

    async def make() -> Response:
        made = view(session_id, await at.outputs.start(lease, want))
        return JSONResponse(made.model_dump(), 201, {"Location": made.links["self"]})

    return await at.idempotency.once(who.owner, f"outputs {session_id}", once, repr(want).encode(), make)


@router.get("", response_model=OutputList, responses=problems(403, 404))
async def list_outputs(session_id: SessionId, who: Who, at: At) -> OutputList:
    """All of the session, those that ended lately too."""
    at.desk.lease(who, session_id, VIEW, CONTROL)
    return OutputList(outputs=[view(session_id, output) for output in at.outputs.of(session_id)])


@router.get("/{output_id}", response_model=OutputView, responses=problems(403, 404))
async def get_output(session_id: SessionId, output_id: OutputId, who: Who, at: At) -> OutputView:
    """One: state, reconnects, last error."""
    at.desk.lease(who, session_id, VIEW, CONTROL)
    return view(session_id, at.outputs.get(session_id, output_id))


@router.delete("/{output_id}", status_code=204, responses=problems(403, 404))
async def end_output(session_id: SessionId, output_id: OutputId, who: Who, at: At) -> Response:
    """End it; a recording is finished and signed. Ending it twice is no error."""
    lease = at.desk.lease(who, session_id, CONTROL)
    at.outputs.stop(lease, at.outputs.get(session_id, output_id))
    return Response(status_code=204)


@router.get("/{output_id}/hls/{name}", response_class=FileResponse, responses=problems(403, 404))
async def playlist(session_id: SessionId, output_id: OutputId, name: FileName, who: Who, at: At) -> FileResponse:
    """Playlist and segments of an HLS output: index.m3u8 is where players begin."""
    at.desk.lease(who, session_id, VIEW)
    path, kind = at.outputs.file(at.outputs.get(session_id, output_id), name)
    return FileResponse(path, media_type=kind)
