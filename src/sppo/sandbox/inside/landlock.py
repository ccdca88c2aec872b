"""Landlock: a process takes rights over files, TCP ports, abstract sockets and signals away from itself (landlock(7)).

Linux 6.12 or newer.
"""

import ctypes
import os

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
VERSION, PATH_BENEATH = 1, 1
EXECUTE, WRITE, READ, LIST, TRUNCATE, IOCTL = 1, 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 15
ALL_FILES = (1 << 16) - 1  # every right over files there is
LOOK = EXECUTE | READ | LIST
CHANGE = ALL_FILES & ~LOOK
ON_A_FILE = EXECUTE | WRITE | READ | TRUNCATE | IOCTL  # those that make sense for what is no folder
BIND_AND_CONNECT_TCP = 3
ABSTRACT_SOCKETS_AND_SIGNALS = 3
NEEDED = 6  # the first version that holds abstract sockets and signals back

libc = ctypes.CDLL(None, use_errno=True)


class Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, "landlock: %s" % os.strerror(code))
    return result


def require():
    """Raises OSError where the kernel cannot do all of it."""
    version = call(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(VERSION))
    if version < NEEDED:
        raise OSError("landlock: the kernel offers version %d, version %d (Linux 6.12) is needed" % (version, NEEDED))


def ruleset(held_back, allowed):
    """A descriptor that holds everything of `held_back` back but for what `allowed` gives: rights by path, on it and
    below."""
    rules = Ruleset(held_back, BIND_AND_CONNECT_TCP, ABSTRACT_SOCKETS_AND_SIGNALS)
    made = call(CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(ctypes.sizeof(rules)), ctypes.c_uint32(0))
    for path, rights in allowed.items():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not every system has every one
        rights &= held_back if os.path.isdir(path) else held_back & ON_A_FILE
        rule = Beneath(rights, place)
        call(ADD_RULE, ctypes.c_int(made), ctypes.c_int(PATH_BENEATH), ctypes.byref(rule), ctypes.c_uint32(0))
        os.close(place)
    return made


def restrict(made):
    """From here on, no more than this ruleset and those before it allow; closes it. Needs no_new_privs."""
    call(RESTRICT_SELF, ctypes.c_int(made), ctypes.c_uint32(0))
    os.close(made)
