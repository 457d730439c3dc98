"""Pushes the checkpoints of a run to a repository on the hub while the run continues."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path

from cookbook.engine import checkpoint
from cookbook.errors import CookbookError
from cookbook.export import export, push
from cookbook.export.config import ExportConfig
from cookbook.utils.notes import counted_noun

logger = logging.getLogger(__name__)

NOT_PUSHED = (checkpoint.OPTIMIZER_FILE, f"{checkpoint.OPTIMIZER_FOLDER}/*")


class HubPushes:
    """A thread that pushes the newest checkpoint. Those saved while it is busy are pushed only if newest.

    A push that fails is logged, and the run continues.
    """

    def __init__(self, repository: str, log_path: Path) -> None:
        self._repository = repository
        self._log_path = log_path
        self._changed = threading.Condition()
        self._waiting: tuple[Path, int] | None = None
        self._is_ending = False
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)
        self._thread.start()

    def add(self, folder: Path, step: int) -> None:
        with self._changed:
            self._waiting = (folder, step)
            self._changed.notify()

    def finish(self) -> None:
        """Ends the thread, then pushes the run's best or last checkpoint with its model card."""
        self.close()
        config = ExportConfig(checkpoint=str(self._log_path), to=f"{push.SCHEME}{self._repository}")
        try:
            asyncio.run(export.main(config))
        except (CookbookError, OSError) as error:
            logger.warning(
                "%s To push the run: python -m recipes.export checkpoint=%s to=%s%s",
                error,
                self._log_path,
                push.SCHEME,
                self._repository,
            )

    def close(self) -> None:
        """Ends the thread after the push in progress."""
        with self._changed:
            self._is_ending = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._is_ending)
                if self._is_ending or self._waiting is None:
                    return
                (folder, step), self._waiting = self._waiting, None
            try:
                url = push.push(
                    folder, self._repository, True, f"after {counted_noun(step, 'step')}", NOT_PUSHED
                )
                logger.info("Pushed the checkpoint after %d steps to %s.", step, url)
            except (CookbookError, OSError) as error:
                logger.warning("The checkpoint after %d steps was not pushed. %s", step, error)
