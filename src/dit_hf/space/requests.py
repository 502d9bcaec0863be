"""What the server answers: the page's own requests, of a size and a form that they have; and which clients listen."""

import ipaddress
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, QueryParams
from starlette.types import ASGIApp, Message, Receive, Scope, Send


MAX_BODY = 2**20  # bytes; 32 class names have a thousandth of it
MAX_STREAMS = 512  # open at the same time, of one address
MAX_SESSIONS = 1000
MAX_SILENT = 64  # of one address, that have not begun to listen
MAX_EVENTS = 16  # unfinished ones of one session
MAX_DEPTH = 8  # of lists in lists; the page sends two
# Seconds that a client may take between sending a set and listening to its images, as both are separate requests.
PATIENCE = 5.0
SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
API = "/gradio_api"
STREAM, HEARTBEAT = f"{API}/queue/data", f"{API}/heartbeat/"
# What browsers and gradio_client ask for. Gradio has much more: uploads, proxies, monitoring, an editor.
PAGES = re.compile(
    r"/|/config/?|/theme\.css|/robots\.txt|/favicon\.ico|/manifest\.json|/pwa_icon(/[0-9]{1,4})?"
    r"|/(assets|static|svelte)/[^\0]{1,200}"
    rf"|{API}/(info/?|openapi\.json|app_id/?|theme\.css|startup-events|queue/status|queue/data|heartbeat/[^/]+"
    r"|call/[a-z_]+/[0-9a-f]+|file=.{1,1000})"
)
FILE = re.compile(rf"{API}/file=(?P<path>.+\.png)", re.DOTALL)
POSTS = re.compile(rf"{API}/(queue/join|cancel|reset/?|run/[a-z_]+/?|api/[a-z_]+/?|call/[a-z_]+/?)")
TOO_MANY = "Too many requests; close some of this page's tabs, or try again later."


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass
class Session:
    """One page, or one program: its open streams, and when it last asked for something."""

    address: str
    streams: int = 0
    asked: float = field(default_factory=time.monotonic)

    @property
    def is_gone(self) -> bool:
        return not self.streams and time.monotonic() - self.asked > PATIENCE


class Clients:
    """
    Knows which sessions listen to what they have asked for. Used by one thread.

    Args:
        on_leave (`Callable`): Called with a session that has closed its last stream, or never opened one.
    """

    def __init__(self, on_leave: Callable[[str], None]):
        self._on_leave = on_leave
        self._sessions: dict[str, Session] = {}

    def __contains__(self, session: str) -> bool:
        return session in self._sessions

    def is_gone(self, session: str) -> bool:
        """
        Whether nobody listens to a session's images.

        Args:
            session (`str`): Known or not.

        Returns:
            `bool`
        """
        return session not in self._sessions or self._sessions[session].is_gone

    def ask(self, session: str, address: str) -> None:
        """
        Notes that a session has asked for something that it will listen to.

        Args:
            session (`str`): New or known.
            address (`str`): Its client's.

        Raises:
            Refused: if too many sessions ask, or don't listen.
        """
        if session in self._sessions:
            self._sessions[session].asked = time.monotonic()
            return
        for name in [name for name, known in self._sessions.items() if known.is_gone]:
            self._forget(name)
        silent = sum(known.address == address and not known.streams for known in self._sessions.values())
        if silent >= MAX_SILENT or len(self._sessions) >= MAX_SESSIONS:
            raise Refused(429, TOO_MANY)
        self._sessions[session] = Session(address)

    @contextmanager
    def listening(self, session: str) -> Iterator[Callable[[], None]]:
        """
        While a stream of a session is open.

        Args:
            session (`str`): It has asked for something.

        Yields:
            `Callable`: to be called when it is the client that closes the stream.
        """
        known = self._sessions[session]
        known.streams += 1
        opened = time.monotonic()
        closed: list[bool] = []
        try:
            yield lambda: closed.append(True)
        finally:
            known.streams -= 1
            # What was asked for since then may be listened to by a stream that has yet to come.
            left = closed and not known.streams and (known.asked <= opened or known.is_gone)
            if left and self._sessions.get(session) is known:
                self._forget(session)

    def _forget(self, session):
        del self._sessions[session]
        self._on_leave(session)


class Gate:
    """
    ASGI middleware that lets through what the page needs and answers everything else itself, in one line.

    Args:
        app (`ASGIApp`): Gradio's.
        blocks (`gradio.Blocks`): The page; its functions are what can be called.
        clients (`Clients`): Told of who listens.
        folder (`Path`): The images; no other file is served.
    """

    def __init__(self, app: ASGIApp, blocks: Any, clients: Clients, folder: Path):
        self.app, self.blocks, self.clients, self.folder = app, blocks, clients, folder
        self._streams: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        else:
            try:
                await self._answer(scope, receive, send)
            except Refused as error:
                await refuse(error, send)

    async def _answer(self, scope, receive, send):
        path, method = scope["path"], scope["method"]
        if "SPACE_ID" in os.environ:  # on the Hub, where all come from the same proxy
            scope = {**scope, "client": (forwarded_for(scope), 0)}
        if method == "OPTIONS":  # Gradio answers by its rules for other origins
            await self.app(scope, receive, send)
        elif method in ("GET", "HEAD") and PAGES.fullmatch(path):
            self._check_file(path)
            if path == STREAM or path.startswith((HEARTBEAT, f"{API}/call/")):
                await self._stream(scope, receive, send)
            else:
                await self.app(scope, receive, send)
        elif method == "POST" and POSTS.fullmatch(path):
            given = await read_json(scope, receive)
            wanted = self._checked(path.removeprefix(f"{API}/").rstrip("/"), given, scope)
            await self.app(*with_body(scope, receive, json.dumps(wanted).encode()), send)
        else:
            raise Refused(404, "There is no such page.")

    def _check_file(self, path):
        if not path.startswith(f"{API}/file="):
            return
        found = FILE.fullmatch(path)
        file = found["path"] if found and "\0" not in path else ""
        inside = file.startswith(f"{self.folder}{os.sep}") and os.path.normpath(file) == file
        if not inside or not os.path.isfile(file) or os.path.realpath(file) != file:
            raise Refused(404, "There is no such file; images are kept for ten minutes.")

    async def _stream(self, scope, receive, send):
        beats = scope["path"].startswith(HEARTBEAT)
        session = scope["path"].removeprefix(HEARTBEAT) if beats else self._session_of(scope)
        self._check_session(session)
        address = address_of(scope, session)
        if self._streams.get(address, 0) >= MAX_STREAMS:
            raise Refused(429, TOO_MANY)
        self._streams[address] = self._streams.get(address, 0) + 1
        try:
            if beats:
                await self.app(scope, receive, send)
                return
            with self.clients.listening(session) as closed:
                await self.app(scope, *watched(receive, send, closed))
        finally:
            self._streams[address] -= 1
            if not self._streams[address]:
                del self._streams[address]

    def _session_of(self, scope):
        """The session of a stream, if it waits for something."""
        if scope["path"] == STREAM:
            session = QueryParams(scope["query_string"]).get("session_hash", "")  # as Gradio reads it
        else:
            event = scope["path"].rsplit("/")[-1]
            pending = getattr(self.blocks._queue, "pending_event_ids_session", {})
            session = next((name for name, events in pending.items() if event in events), "")
        if session not in self.clients:
            raise Refused(404, "This session waits for nothing.")
        return session

    def _check_session(self, session):
        if not isinstance(session, str) or not SESSION.fullmatch(session):
            raise Refused(400, "`session_hash` must have 1 to 64 letters and digits.")

    def _checked(self, route, body, scope):
        """The fields of a request that Gradio needs, if they are what the page sends."""
        session = body.get("session_hash")
        if session is not None or route in ("queue/join", "cancel"):
            self._check_session(session)
        if route in ("cancel", "reset"):
            wanted = {name: body.get(name) for name in ("session_hash", "fn_index", "event_id")}
            if not isinstance(wanted["fn_index"], (int, type(None))) or not is_short(wanted["event_id"]):
                raise Refused(400, "`fn_index` must be a number, and `event_id` a text.")
            return wanted
        function = self._function(route, body.get("fn_index"))
        data = body.get("data")
        if not isinstance(data, list) or len(data) != len(function.inputs):
            raise Refused(400, f"`data` must be a list of {len(function.inputs)} values.")
        if not is_plain(data):
            raise Refused(400, "`data` must hold texts, numbers and lists of them.")
        trigger, event = body.get("trigger_id"), body.get("event_data")
        trigger = trigger if type(trigger) is int else None
        event = event if isinstance(event, dict) else {}
        event = {name: value for name, value in event.items() if isinstance(value, str)}  # keys and what is written
        wanted = {"data": data, "fn_index": function._id, "trigger_id": trigger, "event_data": event}
        if not route.startswith(("run/", "api/")):
            session = session or uuid.uuid4().hex
            pending = getattr(self.blocks._queue, "pending_event_ids_session", {})
            if len(pending.get(session, ())) >= MAX_EVENTS:
                raise Refused(429, TOO_MANY)
            self.clients.ask(session, address_of(scope, session))
        return wanted | {"session_hash": session}

    def _function(self, route, index):
        """What is called: by its number, or by its name in the route."""
        name = route.partition("/")[2]
        for function in self.blocks.fns.values():
            by_name = route != "queue/join" and name != "predict" and function.api_name == name
            by_number = type(index) is int and function._id == index
            if function.fn is not None and (by_name or by_number):
                return function
        raise Refused(404, "There is no such function; `/gradio_api/info` lists them.")


def address_of(scope: Scope, session: str) -> str:
    """The client's address, as the server, or the proxy that it trusts, gives it; without one, its session."""
    return (scope.get("client") or ("",))[0] or session


def forwarded_for(scope: Scope) -> str:
    """The public address that proxies have added last, as clients can write others before it; empty without one."""
    for added in reversed(",".join(Headers(scope=scope).getlist("x-forwarded-for")).split(",")):
        with suppress(ValueError):
            if ipaddress.ip_address(added.strip()).is_global:
                return added.strip()
    return ""


def is_short(text: Any) -> bool:
    """Whether it is nothing, or a text without surprises."""
    return text is None or (isinstance(text, str) and SESSION.fullmatch(text) is not None)


def is_plain(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether a value holds no JSON object, in which Gradio would look for files, and not too many lists in lists."""
    if isinstance(value, list):
        return depth > 0 and all(is_plain(entry, depth - 1) for entry in value)
    return not isinstance(value, dict)


async def read_json(scope: Scope, receive: Receive) -> dict[str, Any]:
    """The object that is the body of a request."""
    headers = dict(scope["headers"])
    if not headers.get(b"content-type", b"").lower().startswith(b"application/json"):
        raise Refused(415, "The body must be `application/json`.")
    body = bytearray()
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise Refused(413, f"The body must have at most {MAX_BODY:,} bytes.")
        more = message.get("more_body", False)
    try:
        value = json.loads(body.decode())
    except (ValueError, RecursionError):
        raise Refused(400, "The body is no JSON.") from None
    if not isinstance(value, dict):
        raise Refused(400, "The body must be a JSON object.")
    return value


def with_body(scope: Scope, receive: Receive, body: bytes) -> tuple[Scope, Receive]:
    """A request with another body."""
    length = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    dropped = (b"content-type", b"content-length", b"transfer-encoding", b"content-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name not in dropped] + length
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return {**scope, "headers": headers}, again


def watched(receive: Receive, send: Send, on_close: Callable[[], None]) -> tuple[Receive, Send]:
    """A request's channels, which tell if the client closes the connection before the end."""
    ended: list[bool] = []

    async def received() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect" and not ended:
            on_close()
        return message

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            ended.append(True)
        await send(message)

    return received, sent


async def refuse(error: Refused, send: Send) -> None:
    """Answers with the reason."""
    body = json.dumps({"detail": str(error)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
