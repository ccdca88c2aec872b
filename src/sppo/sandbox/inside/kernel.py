"""System calls with which a process gives up its rights: for the zygote of programs and for the scorer of gym answers."""

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)


class FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


class CapabilityHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class CapabilityData(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


def check(result, what):
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, "%s: %s" % (what, os.strerror(code)))


def drop_capabilities():
    check(libc.capset(ctypes.byref(CapabilityHeader(0x20080522, 0)), ctypes.byref((CapabilityData * 2)())), "capset")


def as_filter(code):
    """The bytes of a system-call filter (seccomp.py) as prctl takes them."""
    buffer = ctypes.create_string_buffer(code, len(code))
    made = FilterProgram(len(code) // 8, ctypes.addressof(buffer))
    made.keep = buffer
    return made


def seconds_in_line(pid):
    """How long a process has waited for a processor that was busy with something else; 0 where the system does not say."""
    try:
        with open("/proc/%d/schedstat" % pid) as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0
