"""DeepSpeed's part of a checkpoint, written so that a full disk on one rank keeps no other waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

Part = Callable[[Callable[[], Any]], None]
"""Does a piece of the writing and keeps a disk's failure to itself."""


@contextmanager
def meeting_in_spite_of_failures(engine: Any, part: Part) -> Iterator[None]:
    """While this is open, only the writing of engine.save_checkpoint can fail: every rank comes to its closing barrier.

    Args:
        engine: a DeepSpeedEngine.
        part: gets each piece of the writing.
    """
    save_checkpoint = engine.save_checkpoint

    @wraps(save_checkpoint)
    def save(folder: str, **options: Any) -> None:
        # The last of its files is written between two barriers, by the first rank alone.
        save_checkpoint(folder, save_latest=False, **options)
        if engine.global_rank == 0:
            part(lambda: (Path(folder) / "latest").write_text(f"global_step{engine.global_steps}"))

    # DeepSpeed has no hook around its writing; its methods are put back afterwards.
    with ExitStack() as replaced:
        for owner, name in (
            (engine.checkpoint_engine, "makedirs"),
            (engine.checkpoint_engine, "save"),
            (engine, "_copy_recovery_script"),
        ):
            _replace(replaced, owner, name, _in_part(getattr(owner, name), part))
        _replace(replaced, engine, "save_checkpoint", save)
        yield


def _in_part(write: Callable[..., Any], part: Part) -> Callable[..., None]:
    return lambda *args, **kwargs: part(lambda: write(*args, **kwargs))


def _replace(replaced: ExitStack, owner: Any, name: str, function: Callable[..., Any]) -> None:
    setattr(owner, name, function)
    replaced.callback(delattr, owner, name)
