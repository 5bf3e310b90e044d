"""Fixtures of the unit tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from lift_ds.runtime.logs import get_logger


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


@pytest.fixture(scope="module", autouse=True)
def _no_other_ranks() -> Iterator[None]:
    """Files of other folders run in the same process. By this variable DeepSpeed would wait for a rank beside this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOCAL_SIZE", raising=False)
        yield


@pytest.fixture
def lift_log() -> Iterator[list[str]]:
    """The lines ("INFO ...") that the logger "lift_ds" says within the test; it does not propagate to caplog."""
    collector = _Collector()
    logger = get_logger()
    logger.addHandler(collector)
    yield collector.lines
    logger.removeHandler(collector)
