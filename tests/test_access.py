"""Keys, tokens, quotas, repeated requests, the store of avatars: what decides, alone."""

import asyncio
import json
import shutil
import threading
import time
from types import SimpleNamespace

import jwt
import pytest
from starlette.responses import JSONResponse

from liveavatar.serving import listen
from liveavatar.serving.access import SCOPES, Access, Principal
from liveavatar.serving.durable import replace_file
from liveavatar.serving.feeder import WAITING, WAITING_BYTES, Feeder, Utterance
from liveavatar.serving.gate import address
from liveavatar.serving.idempotency import REPLAYED, Idempotency
from liveavatar.serving.problems import BufferFull, Conflict, Forbidden, NotFound, RateLimited, Unauthorized
from liveavatar.serving.quotas import FAILURES, MessageRate, Quotas
from liveavatar.serving.settings import AccessConfig, ListenConfig, ServeConfig
from liveavatar.serving.store import AvatarStore
from api_server import bearer, portrait, running, settings


def who(access: Access, text: str) -> Principal:
    return asyncio.run(access.who(text))


def refusal(access: Access, text: str | None) -> str:
    with pytest.raises(Unauthorized) as caught:
        asyncio.run(access.who(text))
    return caught.value.kind


@pytest.fixture
def access(tmp_path):
    return Access(tmp_path, AccessConfig())


# ---------------------------------------------------------------- keys and tokens (API-5)


def test_the_first_key_is_made_once_and_only_its_hash_is_kept(tmp_path, access):
    text = access.first_key()
    assert who(access, text) == Principal(owner="operator", scopes=frozenset(SCOPES), key=text[3:15])
    again = Access(tmp_path, AccessConfig())
    assert again.first_key() is None and who(again, text).owner == "operator"
    kept = (tmp_path / "keys.json").read_text()
    assert text not in kept and text[16:] not in kept and "argon2id" in kept
    assert (tmp_path / "keys.json").stat().st_mode & 0o77 == 0 == (tmp_path / "token.key").stat().st_mode & 0o77


def test_wrong_and_revoked_keys_open_nothing(access):
    key, text = access.create_key("acme", ["view"])
    operator = Principal(owner="operator", scopes=frozenset(["admin"]), key="x")
    assert who(access, text).owner == "acme"  # also remembers it
    assert refusal(access, text[:-1] + ("A" if text[-1] != "A" else "B")) == "key"
    assert refusal(access, f"la_{'0' * 12}_{text[16:]}") == "key"
    with pytest.raises(NotFound):
        access.revoke_key(Principal(owner="other", scopes=frozenset(["control"]), key="y"), key.prefix)
    access.revoke_key(operator, key.prefix)
    assert refusal(access, text) == "key" and refusal(access, None) == "missing" and refusal(access, "") == "missing"


def test_a_token_reaches_one_session_with_scopes_the_maker_had(access):
    key, text = access.create_key("acme", ["view", "control"])
    maker = who(access, text)
    token, ends = access.token(maker, "session-1", "acme", ["view"], seconds=1e9)
    found = who(access, token)
    assert found == Principal(owner="acme", scopes=frozenset(["view"]), key=key.prefix, session="session-1")
    assert ends <= time.time() + AccessConfig().token_seconds and jwt.decode(token, options={"verify_signature": False})["aud"] == "liveavatar"
    assert found.sees("acme", "session-1") and not found.sees("acme", "session-2") and not found.sees("other", "session-1")
    with pytest.raises(Forbidden):
        found.need("publish")  # a view token can never speak
    with pytest.raises(Forbidden):
        access.token(maker, "session-1", "acme", ["publish"])
    access.revoke_key(Principal(owner="acme", scopes=frozenset(["admin"]), key="x"), key.prefix)
    assert refusal(access, token) == "token"


@pytest.mark.parametrize("change, kind", [
    ({"exp": 1}, "expired"), ({"aud": "other"}, "audience"), ({"aud": None}, "token"), ({"sub": None}, "token"), ({"scope": None}, "token"),
    ({"key": "0" * 12}, "token"), ({"exp": None}, "token"),
])  # fmt: skip
def test_tokens_that_are_not_ours(tmp_path, access, change, kind):
    key, _ = access.create_key("acme", SCOPES)
    claims = {"aud": "liveavatar", "sub": "s", "scope": "view", "own": "acme", "key": key.prefix, "exp": int(time.time()) + 60}
    claims = {name: value for name, value in {**claims, **change}.items() if value is not None}
    secret = (tmp_path / "token.key").read_bytes()
    assert refusal(access, jwt.encode(claims, secret, algorithm="HS256")) == kind
    assert refusal(access, jwt.encode(claims, b"another secret of 32 bytes or more", algorithm="HS256")) == "token"
    assert refusal(access, jwt.encode(claims, None, algorithm="none")) == "token"


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "keys.json"
    replace_file(file, b"old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        replace_file(file, b"new and longer")
    assert file.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["keys.json"]


# ---------------------------------------------------------------- quotas (API-3)


def test_quotas_count_by_key_and_say_when_to_come_again():
    quotas = Quotas(AccessConfig(sessions_per_minute=2, audio_seconds_per_day=10))
    for _ in range(2):
        quotas.count("sessions", "a")
    with pytest.raises(RateLimited) as caught:
        quotas.count("sessions", "a")
    assert caught.value.kind == "rate" and 1 <= int(caught.value.headers["Retry-After"]) <= 60
    quotas.count("sessions", "b")
    with pytest.raises(BufferFull), quotas.speech("a", 10.0):
        raise BufferFull  # what was not taken does not count
    for seconds in (9.99, 5.0):  # the last may go over
        with quotas.speech("a", seconds):
            pass
    with pytest.raises(RateLimited) as caught, quotas.speech("a", 0.02):
        raise AssertionError("it was taken")
    assert caught.value.kind == "quota" and int(caught.value.headers["Retry-After"]) > 60
    with quotas.speech("a", 0):  # an end
        pass


def test_whoever_guesses_keys_is_kept_out_by_network():
    quotas = Quotas(AccessConfig())
    for n in range(FAILURES):
        quotas.check_address("2001:db8::1")
        quotas.failed(f"2001:db8::{n:x}")  # one IPv6 customer has a /64
    with pytest.raises(RateLimited):
        quotas.check_address("2001:db8::ffff")
    quotas.check_address("2001:db8:0:1::1")
    quotas.check_address("192.0.2.1")


@pytest.mark.parametrize("proxies, peer, told, seen", [
    ((), "127.0.0.1", "203.0.113.7", "127.0.0.1"),  # nobody is believed, whatever the environment says
    (("10.0.0.0/30",), "192.0.2.9", "203.0.113.7", "192.0.2.9"),  # not a proxy of ours
    (("10.0.0.0/30",), "10.0.0.2", "6.6.6.6, 203.0.113.7", "203.0.113.7"),  # what the client wrote itself stands before
    (("10.0.0.0/30",), "10.0.0.2", "203.0.113.7, 10.0.0.1", "203.0.113.7"),  # two proxies of ours
])
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_failures_behind_a_proxy_count_for_whoever_it_names(monkeypatch, kind, proxies, peer, told, seen):
    """18.5: else one who guesses keys shuts out everybody behind the same proxy, or nobody, by a header of their own."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    found = []

    async def app(scope, receive, send):
        found.append(address(scope))

    server = listen.server(app, ServeConfig(listen=ListenConfig(proxies=proxies)))
    server.config.load()
    scope = {"type": kind, "client": (peer, 1), "headers": [(b"x-forwarded-for", told.encode())], "scheme": "http", "path": "/", "state": {}}
    asyncio.run(server.config.loaded_app(scope, None, None))
    assert found == [seen]


def test_a_socket_may_burst_but_not_flood():
    rate = MessageRate(per_second=10)
    assert [rate.take(100.0) for _ in range(21)] == [True] * 20 + [False]
    assert rate.take(101.0)


# ---------------------------------------------------------------- repeated requests


def test_a_repeated_request_gets_the_first_answer():
    made, now = [], [0.0]

    async def make():
        made.append(1)
        return JSONResponse({"n": len(made)}, 201, {"Location": "/x"})

    async def fail():
        raise BufferFull

    async def story():
        kept = Idempotency(seconds=10, clock=lambda: now[0])
        first = await kept.once("acme", "sessions", "k", b"a", make)
        second = await kept.once("acme", "sessions", "k", b"a", make)
        assert second.body == first.body and second.status_code == 201 and second.headers["Location"] == "/x" and second.headers[REPLAYED] == "true"
        with pytest.raises(Conflict) as caught:
            await kept.once("acme", "sessions", "k", b"b", make)
        assert caught.value.kind == "idempotency"
        await kept.once("other", "sessions", "k", b"b", make)  # a tenant of its own
        with pytest.raises(BufferFull):
            await kept.once("acme", "sessions", "again", b"a", fail)
        await kept.once("acme", "sessions", "again", b"a", make)  # what failed may be tried again
        now[0] = 11.0
        await kept.once("acme", "sessions", "k", b"b", make)
        assert len(made) == 4

    asyncio.run(story())


def test_what_waits_to_be_spoken_is_bounded_in_number_and_in_bytes():
    """Edge "audio in" of section 4: refuse, never drop (BP-1)."""
    for size, most in ((0, WAITING), (WAITING_BYTES // 3, 3), (2 * WAITING_BYTES, 1)):
        feeder = Feeder(None, failed=lambda error: None)
        for n in range(most):
            feeder.put(Utterance(None, n, 0, size=size))
        with pytest.raises(BufferFull):
            feeder.put(Utterance(None, most, 0, size=size))


def test_two_at_once_make_one():
    async def story():
        kept, go = Idempotency(), asyncio.Event()

        async def make():
            await go.wait()
            return JSONResponse({})

        first = asyncio.create_task(kept.once("acme", "r", "k", b"", make))
        await asyncio.sleep(0)
        with pytest.raises(Conflict):
            await kept.once("acme", "r", "k", b"", make)
        go.set()
        assert (await first).status_code == 200

    asyncio.run(story())


# ---------------------------------------------------------------- avatars


def test_avatars_survive_a_restart_and_halves_do_not(tmp_path):
    store = AvatarStore(tmp_path)
    kept = store.add(portrait(), name="Ada", owner="acme", consent=None, media="00")
    gone = store.add(portrait(seed=1), name="Bob", owner="acme", consent=None, media="00")
    store.erase(gone.id)
    half = tmp_path / f".{kept.id[:-1]}0"
    half.mkdir()
    (half / "portrait.png").write_bytes(b"half")
    again = AvatarStore(tmp_path)
    assert again.get(kept.id) == kept and again.portrait(kept.id).read_bytes() == portrait() and not half.exists()
    assert [a.id for a in again.list(lambda owner: owner == "acme")][-1] == kept.id and "default" in [a.id for a in again.list(lambda owner: False)]
    assert not any("Bob" in path.read_text() for path in tmp_path.rglob("*.json"))
    with pytest.raises(NotFound):
        again.get(gone.id)
    with pytest.raises(NotFound):
        again.get(kept.id, lambda owner: owner == "other")
    with pytest.raises(Conflict):
        again.erase("default")
    for name in ("../keys.json", "av_../../x", "", ".", "/etc/passwd", "default/../../x"):
        with pytest.raises(NotFound):
            again.portrait(name)
    assert json.loads((tmp_path / kept.id / "avatar.json").read_text())["name"] == "Ada"


def test_the_list_is_read_while_another_thread_adds_and_two_erase_one(tmp_path):
    store = AvatarStore(tmp_path)

    def sees(owner: str) -> bool:  # in the middle of a list
        store.add(portrait(), name="late", owner="acme", consent="c", media="00")
        return True

    mine = store.add(portrait(), name="Ada", owner="acme", consent="c", media="00")
    assert [avatar.id for avatar in store.list(sees)][-1] == mine.id and len(store.with_consent("c")) == 2
    shutil.rmtree(tmp_path / mine.id)  # as far as the other one has come
    with pytest.raises(NotFound):
        store.erase(mine.id)


def test_a_key_is_made_beside_the_event_loop(tmp_path):
    """Its hash takes as long as a picture may be late."""
    where = []

    async def story():
        async with running(settings(tmp_path)) as server:
            hasher, access = server.at.access._hasher, server.at.access
            access._hasher = SimpleNamespace(hash=lambda text: where.append(threading.current_thread()) or hasher.hash(text), verify=hasher.verify)
            made = await server.http.post("/v1/keys", json={"owner": "acme"})
            assert made.status_code == 201 and where[0] is not threading.main_thread()
            assert (await server.http.delete(f"/v1/keys/{made.json()['prefix']}")).status_code == 204
            assert (await server.http.get("/v1/server", headers=bearer(made.json()["key"]))).status_code == 401

    asyncio.run(story())
