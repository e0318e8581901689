"""Whatever goes wrong becomes a problem with a real status (API-4): no stack, no path, nothing the client sent."""

from __future__ import annotations

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from liveavatar.core import InputError, LiveAvatarError, RankFailure, SessionClosed
from liveavatar.serving.gate import ProblemResponse, count
from liveavatar.serving.problems import Capacity, Conflict, Invalid, NotFound, Problem, TooLarge, Unprocessable, Unsupported

log = structlog.get_logger("liveavatar.http")


class NotAllowed(Problem):
    """No such method here."""

    status, kind, title = 405, "method", "Method not allowed"


OF_STATUS = {problem.status: problem for problem in (Invalid, NotFound, NotAllowed, TooLarge, Unsupported, Unprocessable)}


def install(app: FastAPI) -> None:
    """Handlers of every error."""
    app.add_exception_handler(Problem, lambda request, error: _answer(request, error))
    app.add_exception_handler(LiveAvatarError, _of_ours)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(ClientDisconnect, lambda request, error: _answer(request, Invalid("the request broke off")))
    app.add_exception_handler(Exception, _of_bug)


def _number(request: Request) -> str:
    return getattr(request.state, "request_id", "")


def _answer(request: Request, problem: Problem, **more) -> ProblemResponse:
    count(request.app.state.services.metrics, problem, request.url.path)
    if problem.status >= 500:
        log.warning("request_failed", request=_number(request), status=problem.status, kind=problem.kind)
    return ProblemResponse(problem, _number(request), **more)


def as_problem(error: LiveAvatarError) -> Problem:
    """What a client may know of an error of ours."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, InputError):
        return Unprocessable(str(error))
    if isinstance(error, SessionClosed):
        return Conflict("the session is over")
    if isinstance(error, RankFailure):
        return Capacity("the engine is being restarted", kind="engine")
    return Problem("see the server's log")


def _of_ours(request: Request, error: LiveAvatarError) -> ProblemResponse:
    problem = as_problem(error)
    if problem.status == 500:
        log.error("request_broke", request=_number(request), reason=str(error))
    return _answer(request, problem)


def _of_http(request: Request, error: HTTPException) -> ProblemResponse:
    problem = OF_STATUS.get(error.status_code, Invalid)(str(error.detail), headers=error.headers)
    return _answer(request, problem)


def _of_validation(request: Request, error: RequestValidationError) -> ProblemResponse:
    """Where it is wrong and why, without the value: it may be a secret."""
    found = [{"pointer": "/" + "/".join(map(str, item["loc"])), "detail": str(item["msg"])} for item in error.errors()[:20]]
    if any(item["type"] == "json_invalid" for item in error.errors()):
        return _answer(request, Invalid("the body is not JSON"))
    return _answer(request, Unprocessable("the request does not fit the schema"), errors=found)


def _of_bug(request: Request, error: Exception) -> ProblemResponse:
    return _answer(request, Problem("see the server's log"))
