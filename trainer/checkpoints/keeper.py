"""Writes checkpoints so that each is whole or not there, on all ranks alike. A disk that is full costs no run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from trainer.agreement import exchanged
from trainer.checkpoints import folders as checkpoints
from trainer.config.fingerprint import differences, learning_options
from trainer.config.shared import SharedOptions
from trainer.errors import CheckpointError

log = logging.getLogger(__name__)


class CheckpointKeeper:
    """Every rank has one and calls the same methods at the same points.

    Args:
        wait: returns when every rank has called it.
    """

    def __init__(self, config: SharedOptions, *, wait: Callable[[], None]) -> None:
        self._config = config
        self._wait = wait
        self._failure: str | None = None
        self.failed = 0
        """Checkpoints that could not be written."""
        self.saved_step = 0
        """Steps behind the newest whole checkpoint."""

    def find(self) -> Path | None:
        """The newest whole checkpoint, to go on from. A configuration that has changed since is told of."""
        found = checkpoints.last_complete(self._config.checkpoints_dir)
        if found is None:
            return None
        folder, self.saved_step = found
        changed = differences(checkpoints.settings_of(folder), learning_options(self._config))
        if changed and self._config.process_index == 0:
            log.warning("%s was trained with other options, from here on it is: %s", folder, "; ".join(changed))
        return folder

    def save(self, step: int, write: Callable[[Path], None]) -> bool:
        """Write the checkpoint after `step` steps; whether there is one now.

        Args:
            write: fills the folder.
        """
        folder = self._config.checkpoints_dir / f"checkpoint-{step}"
        is_writer = self._config.should_save
        if is_writer:
            checkpoints.clear_after(folder.parent, self.saved_step)
        self._failure = checkpoints.lack_of_room(self._config.checkpoints_dir) if is_writer else None
        if not self.is_well():
            return self._gave_up(folder)
        if is_writer:
            checkpoints.clear(folder)
        self._wait()
        self.part(lambda: write(folder))
        if not self.is_well():
            return self._gave_up(folder)
        if is_writer:
            self.part(lambda: self._mark(folder, step))
        if not self.is_well():
            return self._gave_up(folder)
        self.saved_step = step
        return True

    def rotate(self, best: str | None = None) -> None:
        """Remove the oldest checkpoints beyond save_total_limit. To be called when the newest is whole.

        Args:
            best: folder of the one that stays besides.
        """
        limit = self._config.save_total_limit
        if limit is not None and self._config.should_save:
            checkpoints.rotate(self._config.checkpoints_dir, limit=limit, best=Path(best).name if best else None)

    def save_final(self, write: Callable[[Path], None]) -> Path:
        """The folder of the final model. It appears when it is whole.

        Raises:
            CheckpointError: it could not be written.
        """
        folder = Path(self._config.run_dir) / "final"
        draft = folder.with_name("final.draft")
        if self._config.should_save:
            checkpoints.clear(draft)
        try:
            write(draft)
            if self._config.should_save:
                checkpoints.put_in_place(draft, folder)
        except Exception as error:
            if not checkpoints.is_write_failure(error):
                raise
            checkpoints.clear(draft)
            raise CheckpointError(
                f"the final model could not be written to {folder}: {error}\n"
                "hint: free space and give the same command again; it goes on from the newest checkpoint"
            ) from error
        return folder

    def part(self, write: Callable[[], None]) -> None:
        """Do a piece of the writing, unless one has failed before.

        A disk's failure is remembered, not raised: the other ranks may wait in what follows.
        """
        if self._failure is not None:
            return
        try:
            write()
        except Exception as error:
            if not checkpoints.is_write_failure(error):
                raise
            self._failure = f"{type(error).__name__}: {error}".splitlines()[0]

    def is_well(self) -> bool:
        """Whether no rank has failed at this checkpoint so far. Every rank asks at the same point."""
        failures = [text for text in exchanged(self._failure, ranks=self._config.world_size) if text is not None]
        self._failure = failures[0] if failures else None
        return not failures

    def _mark(self, folder: Path, step: int) -> None:
        checkpoints.mark_complete(
            folder, step=step, run_name=str(self._config.run_name), settings=learning_options(self._config)
        )

    def _gave_up(self, folder: Path) -> bool:
        self.failed += 1
        if self._config.should_save:
            checkpoints.clear(folder)
        log.warning(
            "no checkpoint after this step, the run goes on from the one after %d steps if it is cut off now: %s. Free "
            "space in %s, or lower save_total_limit",
            self.saved_step,
            self._failure,
            folder.parent,
        )
        return False
