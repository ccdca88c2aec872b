"""Running programs that a model wrote. The verdict is always formed out here, from plain data, never inside the jail.

Sandbox(backend="bwrap", slots=2) ─► script / calls / asserts ─► one Result or one list of verdicts per program
"""

from .job import Job, Limits, Result, Status
from .pool import BACKENDS, Sandbox
from .verdict import Case, Report, TestCode, asserts, calls, stdio

__all__ = [
    "BACKENDS",
    "Case",
    "Job",
    "Limits",
    "Report",
    "Result",
    "Sandbox",
    "Status",
    "TestCode",
    "asserts",
    "calls",
    "stdio",
]
