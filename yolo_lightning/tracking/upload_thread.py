"""A thread that uploads the journal to MLflow during training."""

import math
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

    FINAL_DELAYS_S = (0.0, 0.5, 1.0)
    """Delays before the attempts at the end: a database may be locked for a moment."""

    OUTAGE_TIMEOUT_S = 10.0
    """How long the end waits for a store that fails."""

    def __init__(self, uploader: Uploader, interval_s: float = 5.0) -> None:
        self.uploader, self.interval_s = uploader, interval_s
        self._failures, self._complete = 0, False
        self._stop, self._timed_out = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow-upload", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._upload_all()
            self.uploader.journal.update_index()
            interval = min(self.interval_s * 2 ** min(self._failures, 10), self.MAX_INTERVAL_S)
            self._stop.wait(interval)
        for delay in self.FINAL_DELAYS_S:
            if self._timed_out.wait(delay):
                break
            self.uploader.retry_now()
            if self._upload_all():
                self._complete = not self._timed_out.is_set() and not self.uploader.pending
                break
        self.uploader.close()

    def _upload_all(self) -> bool:
        """Upload until there is nothing left or the time is over; return whether it worked."""
        try:
            self.uploader.journal.sync()
            while not self._timed_out.is_set() and self.uploader.upload_next():
                if self._failures:
                    rank_zero_info(
                        "MLflow is available again; the metrics kept so far are being uploaded"
                    )
                self._failures = 0
        except Exception as error:
            self._failures += 1
            if self._failures == 1:
                rank_zero_warn(
                    f"MLflow at {mask_secrets(self.uploader.store_uri)} is not available "
                    f"({short_message(error)}); metrics are kept in {self.uploader.journal.folder} "
                    "and uploaded later, training continues"
                )
            return False
        return True

    def finish(self, timeout_s: float = math.inf) -> bool:
        """Upload the rest and stop; return whether everything is in the store.

        Waits at most `timeout_s`, and not long for a store that fails.
        """
        started = time.monotonic()
        self._stop.set()
        while self._thread.is_alive():
            limit_s = min(timeout_s, self.OUTAGE_TIMEOUT_S) if self._failures else timeout_s
            if time.monotonic() - started > limit_s:
                break
            self._thread.join(0.05)
        self._timed_out.set()
        return self._complete and not self._thread.is_alive()
