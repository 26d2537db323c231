"""A thread beside the training that brings its journal into MLflow."""

import threading
import time

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from yolo_lightning.tracking.shipper import Shipper
from yolo_lightning.tracking.store import public, short


class ShippingThread:
    """Ships a journal beside the training, and never raises into it.

    Args:
        shipper: of the journal.
        every_s: seconds between two looks at the journal.
    """

    MAX_PAUSE_S = 30.0
    """Between two tries where the store fails."""

    LAST_PAUSES_S = (0.5, 1.0)
    """Before the tries at the end, where the first one fails."""

    HUNG_S = 30.0
    """After which a store that does not answer is not waited for."""

    def __init__(self, shipper: Shipper, every_s: float = 5.0) -> None:
        self.shipper, self.every_s = shipper, every_s
        self._failures, self._busy_since, self._complete = 0, 0.0, False
        self._wake, self._ending = threading.Event(), threading.Event()
        self._patience_is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow-shipping", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._wake.clear()
            ending = self._ending.is_set()  # then this round is the last one, and a whole one
            self._ship_all(ending)
            for pause in self.LAST_PAUSES_S if ending else ():
                if not self._failures or self._patience_is_over.wait(pause):
                    break
                self._ship_all(ending)  # a database that was busy for a moment
            if ending:
                break
            pause = min(self.every_s * 2 ** min(self._failures, 10), self.MAX_PAUSE_S)
            self._wake.wait(pause)
        self.shipper.close()

    def _ship_all(self, ending: bool) -> None:
        self._busy_since = time.monotonic()
        try:
            self.shipper.journal.sync()
            if ending:
                self.shipper.hurry()
            while self.shipper.ship():
                self._busy_since = time.monotonic()
                self._answers()
            self._complete = ending and not self.shipper.put_off
        except Exception as error:
            self._failures += 1
            self._say(error)
        self._busy_since = 0.0

    def _answers(self) -> None:
        if self._failures:
            rank_zero_info("MLflow takes figures again; those of the meantime follow")
        self._failures = 0

    def _say(self, error: Exception) -> None:
        if self._failures == 1:
            shipper = self.shipper
            rank_zero_warn(
                f"MLflow at {public(shipper.store)} does not take figures ({short(error)}); "
                f"they are kept in {shipper.journal.folder} and follow, nothing waits for them"
            )

    @property
    def _stuck(self) -> bool:
        """Whether the store has failed, or has not answered for long."""
        busy_since = self._busy_since
        hung = busy_since and time.monotonic() - busy_since > self.HUNG_S
        return self._failures > 0 or bool(hung)

    def finish(self, patience_s: float | None = None) -> bool:
        """Ship what is left and stop; tell whether everything is in the store.

        Waits as long as the store takes entries; where it fails, a few more tries.

        Args:
            patience_s: wait no longer than that.
        """
        started = time.monotonic()
        failures = self._failures
        self._ending.set()
        self._wake.set()
        while self._thread.is_alive():
            self._thread.join(0.05)
            waited = time.monotonic() - started
            if patience_s is not None and waited > patience_s:
                break
            tries = 1 + len(self.LAST_PAUSES_S)
            if self._stuck and (self._failures >= failures + tries or waited > self.HUNG_S / 3):
                break
        self._patience_is_over.set()
        return self._complete and not self._thread.is_alive()
