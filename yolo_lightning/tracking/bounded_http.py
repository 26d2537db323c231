"""Bounds for the answers of MLflow servers: size, time, no compression, no other host."""

import contextlib
import os
import socket
import threading
from typing import Any

import requests
from mlflow.utils import request_utils
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection

MAX_ANSWER_BYTES = 32 * 2**20
"""A page of a thousand runs' metrics is a third of it; as Python objects it may be ten times it."""

_TIME_FACTOR = 3  # of MLFLOW_HTTP_REQUEST_TIMEOUT, which bounds each wait for a part of the answer
_CHUNK_BYTES = 2**20


def bound_answers() -> None:
    """Make MLflow's client refuse answers that are too large or too slow, and redirects.

    A server that sends a byte now and then, an endless answer, or a small one that decompresses to
    gigabytes then fails like one that is not available. MLflow has no setting for this, so its
    adapter of `requests` is replaced.
    """
    os.environ.setdefault("MLFLOW_ALLOW_HTTP_REDIRECTS", "false")
    if request_utils.TCPKeepAliveHTTPAdapter is not _BoundedAdapter:
        setattr(request_utils, "TCPKeepAliveHTTPAdapter", _BoundedAdapter)  # noqa: B010
        request_utils._cached_get_request_session.cache_clear()


class _Deadline(threading.Timer):
    """Shuts a connection down, which ends a `recv` in another thread."""

    def __init__(self, connection: socket.socket) -> None:
        self.limit_s = _TIME_FACTOR * float(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT") or 20)
        super().__init__(self.limit_s, self._shut_down, (connection,))
        self.daemon, self.expired = True, False
        self.start()

    def _shut_down(self, connection: socket.socket) -> None:
        self.expired = True
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


class _BoundedConnection:
    """A connection with a deadline for the headers and, if its reader cancels it, the body."""

    _deadline: _Deadline | None = None

    def getresponse(self) -> Any:
        if self._deadline is not None:
            self._deadline.cancel()  # of an answer that urllib3 has read, to try again
        self._deadline = deadline = _Deadline(self.sock)  # type: ignore[attr-defined]
        try:
            response = super().getresponse()  # type: ignore[misc]
        except Exception:
            deadline.cancel()
            if deadline.expired:
                raise TimeoutError(f"no answer within {deadline.limit_s:g} s") from None
            raise
        response.deadline = deadline
        return response


class _Connection(_BoundedConnection, HTTPConnection):
    pass


class _SecureConnection(_BoundedConnection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


_POOLS = {"http": _Pool, "https": _SecurePool}


class _BoundedAdapter(request_utils.TCPKeepAliveHTTPAdapter):
    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        manager.pool_classes_by_scheme = _POOLS
        return manager

    def send(self, request: Any, stream: bool = False, **options: Any) -> requests.Response:
        request.headers["Accept-Encoding"] = "identity"
        response: requests.Response = super().send(request, stream=stream, **options)
        deadline: _Deadline = response.raw.deadline
        try:
            if not stream:
                response._content = _read(response)
                response._content_consumed = True
        except BaseException:
            response.close()
            if not deadline.expired:
                raise
        finally:
            deadline.cancel()
        if deadline.expired:
            raise requests.exceptions.ReadTimeout(
                f"the answer took longer than {deadline.limit_s:g} s"
            )
        return response


def _read(response: requests.Response) -> bytes:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise requests.exceptions.ContentDecodingError(
            f"the answer is compressed ({encoding[:40]}), which was not asked for"
        )
    chunks: list[bytes] = []
    size = 0
    while chunk := response.raw.read(_CHUNK_BYTES, decode_content=False):
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise requests.exceptions.RequestException(
                f"the answer is larger than {MAX_ANSWER_BYTES >> 20} MiB"
            )
    return b"".join(chunks)
