"""The published OpenAPI, and nonsense made from it: whatever comes in, no answer is a 5xx (18.10)."""

import asyncio
import contextlib
import threading

import pytest

from api_server import bearer, on_port, settings
from liveavatar.serving.routes_sessions import SOUNDS

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given  # noqa: E402
from hypothesis import settings as examples  # noqa: E402
from hypothesis.errors import Unsatisfiable  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402

EXAMPLES = 3  # of each operation, good and bad
UNLIMITED = {name: 10**9 for name in ("requests_per_minute", "sessions_per_minute", "offers_per_minute")}


async def voice(text):
    import numpy as np

    yield np.zeros(160, "int16"), 16_000


class Background:
    """A server on a port of its own, in a thread with its own loop, for a client that blocks."""

    def __init__(self, folder):
        self._folder, self._up, self._over = folder, threading.Event(), None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self):
        self._over = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        async with on_port(settings(self._folder, UNLIMITED), speak=voice) as (self.server, port):
            self.base = f"http://{port}"
            self.session = await self.server.opened()
            self._up.set()
            await self._over.wait()

    def __enter__(self):
        self._thread.start()
        assert self._up.wait(30)
        return self

    def __exit__(self, *exception):
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()


@schemathesis.serializer("application/sdp", "application/trickle-ice-sdpfrag", *SOUNDS)
def as_it_is(context, value):
    """Bodies that are no JSON."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


def test_nonsense_made_from_the_schema_is_never_a_server_error(tmp_path):
    with Background(tmp_path) as running:
        schema, asked = schemathesis.openapi.from_url(f"{running.base}/v1/openapi.json"), []

        def attack(case):
            if "session_id" in (case.path_parameters or {}) and len(asked) % 2:
                case.path_parameters["session_id"] = running.session
            answer = case.call(base_url=running.base, headers=bearer(running.server.key))
            asked.append(answer.status_code)
            assert answer.status_code < 500 or answer.status_code == 503, (case.method, case.path, case.body, answer.text)
            if answer.status_code >= 400 and not case.path.endswith("z"):  # probes say it in their own words
                assert answer.headers["content-type"][0] == "application/problem+json", (case.method, case.path, answer.text)

        for operation in (found.ok() for found in schema.get_all_operations()):
            for mode in GenerationMode:
                attempt = given(operation.as_strategy(generation_mode=mode))(attack)
                with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with a request that takes nothing
                    examples(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                             suppress_health_check=list(HealthCheck))(attempt)()  # fmt: skip
        assert len(asked) > 100 and {200, 201, 404, 422} <= set(asked), sorted(set(asked))
