"""HTTP servers that respond to every request in the same way."""

import contextlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

Responder = Callable[[BaseHTTPRequestHandler], None]


def respond_with(
    status: int, body: str, kind: str = "application/json", **headers: str
) -> Responder:
    def respond(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body.encode())

    return respond


released = Event()
"""Set when the server is closed, for responders that hang."""


@contextlib.contextmanager
def server(respond: Responder) -> Iterator[int]:
    """Send the same response to every request; yield the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with contextlib.suppress(OSError):
                respond(self)

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads, block_on_close = True, False

        def handle_error(self, *args: Any) -> None:
            pass

    released.clear()
    http_server = Quiet(("127.0.0.1", 0), Handler)
    thread = Thread(target=http_server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield http_server.server_port
    finally:
        released.set()
        http_server.shutdown()
        http_server.server_close()
