"""Bounds for the answers of MLflow servers: size, time, no compression, no other host."""

import http.client
import io
import os
import time
from typing import Any

import requests
from mlflow.utils import request_utils
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection

MAX_ANSWER_BYTES = 32 * 2**20
"""A page of a thousand runs' metrics is a third of it; as Python objects it may be ten times it."""

_TIME_FACTOR = 3  # of MLFLOW_HTTP_REQUEST_TIMEOUT, which bounds each wait for a part of the answer


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


class _BoundedReader(io.RawIOBase):
    """The bytes of one answer, headers and body."""

    def __init__(self, source: Any) -> None:
        self._source, self.is_bounded, self._size = source, True, 0
        self._limit_s = _TIME_FACTOR * float(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT") or 20)
        self._end = time.monotonic() + self._limit_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count: int | None = self._source.readinto(buffer)
        self._size += count or 0
        if self.is_bounded and self._size > MAX_ANSWER_BYTES:
            raise OSError(f"the answer is larger than {MAX_ANSWER_BYTES >> 20} MiB")
        if self.is_bounded and time.monotonic() > self._end:
            raise OSError(f"the answer took longer than {self._limit_s:g} s")
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reader = _BoundedReader(self.fp.detach())
        self.fp = io.BufferedReader(self.reader)


class _Connection(HTTPConnection):
    response_class = _Response


class _SecureConnection(HTTPSConnection):
    response_class = _Response


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
        encoding = response.headers.get("Content-Encoding", "identity")
        if stream:  # a download of a file
            response.raw._original_response.reader.is_bounded = False
        elif encoding != "identity":
            response.close()
            raise requests.exceptions.ContentDecodingError(
                f"the answer is compressed ({encoding[:40]}), which was not asked for"
            )
        return response
