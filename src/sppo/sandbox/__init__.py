"""Runs programs that a model wrote. Verdicts are formed outside, from plain data, never inside the jail.

Sandbox(backend="bwrap", slots=2) ─► script / calls / asserts ─► one Result or one list of verdicts per program
"""

from .job import Job, Limits, Result, Status
from .open import open_sandbox
from .pool import BACKENDS, Runs, Sandbox
from .remote import RemoteSandbox
from .verdict import Case, Report, Suite, TestCode, asserts, calls, judge, stdio

__all__ = [
    "BACKENDS",
    "Case",
    "Job",
    "Limits",
    "RemoteSandbox",
    "Report",
    "Result",
    "Runs",
    "Sandbox",
    "Status",
    "Suite",
    "TestCode",
    "asserts",
    "calls",
    "judge",
    "open_sandbox",
    "stdio",
]
