"""The results of tasks, as the handles of this process see them."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

from outbox import configuration
from outbox.errors import ResultLost, TaskCancelled, TaskFailed
from outbox.observer import KeptResults, seam
from outbox.results.open_results import results_store_of
from outbox.results.result_row import CANCELLED, SUCCEEDED, ResultRow
from outbox.settings import Settings
from outbox.system import process
from outbox.tasks.call_arguments import Parameters
from outbox.tasks.codec import REFUSALS
from outbox.tasks.target import parameters_of_task

if TYPE_CHECKING:
    from outbox.results.results_reader import ResultsReader
    from outbox.results.results_store import ResultsStore

__all__ = ["reader_here", "results_of_test", "row_here", "settings_here", "store_here", "value_of"]


def settings_here() -> Settings:
    """Return the settings that say where queues and results are."""
    publisher = configuration.publisher_if_any()
    if publisher is None:
        return configuration.settings_to_store()
    observer = seam.observer
    if observer is None or observer.results is not None:
        return publisher.settings
    return observer.consumed_with(publisher.settings)


def results_of_test() -> KeptResults | None:
    """Return the results of the test that runs here; None outside of tests."""
    return None if seam.observer is None else seam.observer.results


def store_here() -> ResultsStore | None:
    """Return the store of results, or None if none are kept.

    Raises:
        UsageError: results can't be kept in the database of the setting.
    """
    return results_store_of(settings_here())


def reader_here() -> ResultsReader | None:
    """Return what reads the results, or None if none are kept; raises the same."""
    store = store_here()
    return None if store is None else _reader_of(store, process.pid)


def row_here(id_: str) -> ResultRow | None:
    """Return what is kept of a task, or None.

    Raises:
        UsageError: results can't be kept in the database of the setting.
        sqlalchemy.exc.SQLAlchemyError: the database can't be read.
    """
    of_test = results_of_test()
    if of_test is not None:
        row: ResultRow | None = of_test.get(id_)
        return row
    reader = reader_here()
    return None if reader is None else reader.read(id_)


@functools.lru_cache(maxsize=16)
def _reader_of(store: ResultsStore, pid: int) -> ResultsReader:
    from outbox.results.results_reader import ResultsReader

    return ResultsReader(store)


def value_of(row: ResultRow, parameters: Parameters | None) -> Any:
    """Return what a task has returned.

    Args:
        row: its final row.
        parameters: what knows the annotation of the value; None for what this process knows of
            tasks with that name. Without any, the value stays as JSON has it.

    Raises:
        TaskFailed: it has failed.
        TaskCancelled: it was cancelled.
        ResultLost: its value could not be kept, or can't be read.
    """
    if row.status == CANCELLED:
        raise TaskCancelled(f"the task {row.id!r} was cancelled")
    if row.status != SUCCEEDED:
        raise TaskFailed(row.error_type, row.error, row.traceback)
    if row.value is None:
        raise ResultLost(f"the task {row.id!r} has succeeded; {row.error}")
    value = json.loads(row.value)
    if row.is_typed:
        parameters = parameters or parameters_of_task(row.task)
        try:
            return value if parameters is None else parameters.result_read(value)
        except REFUSALS as error:
            raise ResultLost(
                f"the task {row.id!r} has succeeded; what it returned can't be read: {error}"
            ) from None
    return value
