"""A thread that uploads the journal to MLflow during training."""

import threading
import time

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from yolo_lightning.errors import mask_secrets
from yolo_lightning.tracking.store import short_message
from yolo_lightning.tracking.uploader import Uploader


class UploadThread:
    """Uploads a journal in the background, every `interval_s` seconds; never raises."""

    MAX_INTERVAL_S = 30.0
    """Longest time between two attempts while the store fails."""

    FINAL_RETRY_DELAYS_S = (0.5, 1.0)
    """Delays before the additional attempts at the end, if the first one fails."""

    HANG_TIMEOUT_S = 30.0
    """A store that has not responded for this time is considered to hang."""

    def __init__(self, uploader: Uploader, interval_s: float = 5.0) -> None:
        self.uploader, self.interval_s = uploader, interval_s
        self._failures, self._busy_since, self._complete = 0, 0.0, False
        self._wake, self._stop = threading.Event(), threading.Event()
        self._timed_out = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow-upload", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._wake.clear()
            final = self._stop.is_set()  # read before uploading: the final pass is a whole one
            self._upload_all(final)
            for delay in self.FINAL_RETRY_DELAYS_S if final else ():
                if not self._failures or self._timed_out.wait(delay):
                    break
                self._upload_all(final)  # a database may have been locked for a moment
            if final:
                break
            self.uploader.journal.update_index()
            interval = min(self.interval_s * 2 ** min(self._failures, 10), self.MAX_INTERVAL_S)
            self._wake.wait(interval)
        self.uploader.close()

    def _upload_all(self, final: bool) -> None:
        self._busy_since = time.monotonic()
        try:
            self.uploader.journal.sync()
            if final:
                self.uploader.retry_now()
            while not self._timed_out.is_set() and self.uploader.upload_next():
                self._busy_since = time.monotonic()
                self._reset_failures()
            is_cut = self._timed_out.is_set()
            self._complete = final and not is_cut and not self.uploader.deferred
        except Exception as error:
            self._failures += 1
            self._warn_first_failure(error)
        self._busy_since = 0.0

    def _reset_failures(self) -> None:
        if self._failures:
            rank_zero_info("MLflow is available again; the metrics kept so far are being uploaded")
        self._failures = 0

    def _warn_first_failure(self, error: Exception) -> None:
        if self._failures == 1:
            uri, folder = self.uploader.store_uri, self.uploader.journal.folder
            rank_zero_warn(
                f"MLflow at {mask_secrets(uri)} is not available ({short_message(error)}); "
                f"metrics are kept in {folder} and uploaded later, training continues"
            )

    @property
    def _is_stuck(self) -> bool:
        """Whether the store has failed, or has not responded for a long time."""
        busy_since = self._busy_since
        hangs = busy_since and time.monotonic() - busy_since > self.HANG_TIMEOUT_S
        return self._failures > 0 or bool(hangs)

    def finish(self, timeout_s: float | None = None) -> bool:
        """Upload the rest and stop; return whether everything is in the store.

        Waits while the store accepts entries, at most `timeout_s`; retries a few times if it fails.
        """
        started = time.monotonic()
        failures = self._failures
        self._stop.set()
        self._wake.set()
        while self._thread.is_alive():
            self._thread.join(0.05)
            waited = time.monotonic() - started
            if timeout_s is not None and waited > timeout_s:
                break
            attempts = 1 + len(self.FINAL_RETRY_DELAYS_S)
            if self._is_stuck and (
                self._failures >= failures + attempts or waited > self.HANG_TIMEOUT_S / 3
            ):
                break
        self._timed_out.set()
        return self._complete and not self._thread.is_alive()
