"""A proxy on the loopback interface that does to HTTP requests what networks and servers do to them.

Real sockets in front of a real server. Each request meets one fault, chosen by name of what is asked:

    pass    nothing
    delay   half a second, then as usual
    drop    the connection is closed, the server sees nothing
    401, 403, 429, 500, 503   an answer of that status, the server sees nothing
    cut     the server does it, the answer is lost
    half    the server does it, the connection is reset in the middle of the answer
    late    the connection is closed, and the server does it `late_s` seconds later
    hang    no answer at all, for as long as the proxy lives
"""

import contextlib
import http.client
import json
import random
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["SERVED_AND_LOST", "FaultyProxy", "at_random", "each", "nothing"]

Choice = Callable[[str], str]
"""What happens to a request of that name ('runs/create', 'log-batch metrics', 'artifact', ...)."""

SERVED_AND_LOST = ("cut", "half", "late")

_WEIGHTS = {"delay": 2, "drop": 3, "429": 1, "500": 2, "503": 1, "cut": 4, "half": 2, "late": 2}


def nothing(what: str) -> str:
    return "pass"


def each(*faults: str) -> Choice:
    """The first requests of each name meet these faults, one after the other; later ones none."""
    left: dict[str, list[str]] = defaultdict(lambda: list(faults))

    def choose(what: str) -> str:
        return left[what].pop(0) if left[what] else "pass"

    return choose


def at_random(seed: int, share: float) -> Choice:
    """That share of requests meets a fault, drawn from all but `hang`; each lost answer is followed by luck."""
    chance = random.Random(seed)

    def choose(what: str) -> str:
        if chance.random() >= share:
            return "pass"
        return chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]

    return choose


class FaultyProxy:
    """Listens on a port of its own; `choose` may be replaced at any time. `met` counts (name, fault)."""

    def __init__(self, upstream: int, choose: Choice = nothing):
        self.choose = choose
        self.met: Counter[tuple[str, str]] = Counter()
        self.late_s = 2.5
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._late: list[threading.Thread] = []
        proxy = self

        class Handler(_Handler):
            owner, port = proxy, upstream

        class Server(ThreadingHTTPServer):
            daemon_threads, block_on_close, request_queue_size = True, False, 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A connection that was cut is no news here."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def fault(self, what: str) -> str:
        with self._lock:
            fault = self.choose(what)
            self.met[what, fault] += 1
        return fault

    def later(self, work: Callable[[], Any]) -> None:
        def wait_and_work() -> None:
            time.sleep(self.late_s)
            with contextlib.suppress(OSError, http.client.HTTPException):
                work()

        thread = threading.Thread(target=wait_and_work, daemon=True)
        thread.start()
        self._late.append(thread)

    def settle(self) -> None:
        """Wait until what was to happen late has happened."""
        for thread in self._late:
            thread.join(30)

    def faults(self, kinds: Sequence[str] = SERVED_AND_LOST) -> set[str]:
        """The names of requests that met one of these faults."""
        return {what for what, fault in self.met if fault in kinds}

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> "FaultyProxy":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultyProxy
    port: int

    def handle_request(self) -> None:
        body = self._body()
        what = _name(self.command, self.path, body)
        fault = self.owner.fault(what)
        if fault == "hang":
            self.owner.closing.wait()
        if fault in ("drop", "hang", "late"):
            if fault == "late":
                self.owner.later(lambda: self._forward(body))
            self._cut()
        elif fault.isdigit():
            body = b"no" if fault in ("401", "403") else b'{"error_code": "INTERNAL_ERROR", "message": "no"}'
            self._answer(int(fault), body, "application/json")
        else:
            time.sleep(0.5 if fault == "delay" else 0.0)
            self._pass_on(fault, body)

    def _pass_on(self, fault: str, body: bytes) -> None:
        try:
            status, answer, kind = self._forward(body)
        except (OSError, http.client.HTTPException):
            self._cut()  # the server is away
            return
        if fault == "cut":
            self._cut()
        elif fault == "half":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._cut()
        else:
            self._answer(status, answer, kind)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_request

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _forward(self, body: bytes) -> tuple[int, bytes, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            dropped = ("connection", "content-length", "transfer-encoding", "accept-encoding")
            headers = {key: value for key, value in self.headers.items() if key.lower() not in dropped}
            connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.getheader("Content-Type") or "text/plain"
        finally:
            connection.close()

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        pass


def _name(method: str, path: str, body: bytes) -> str:
    path = path.partition("?")[0]
    if "/mlflow-artifacts/" in path:
        return f"artifact {method}"
    name = path.partition("/mlflow/")[2] or path
    if name == "runs/log-batch":
        sent = json.loads(body)
        return "log-batch " + "+".join(key for key in ("metrics", "params", "tags") if sent.get(key))
    return name
