"""Reports of what the stages did: as values, as a table and as an HTML file."""

from __future__ import annotations

from sparse_compile.inspect.report import (
    GraphBreak,
    GraphReport,
    GraphSlice,
    PassTiming,
    Report,
    SiteReport,
    SliceNode,
)

__all__ = [
    "GraphBreak",
    "GraphReport",
    "GraphSlice",
    "PassTiming",
    "Report",
    "SiteReport",
    "SliceNode",
]
