"""The trusted process inside a jail: it waits with its imports loaded, and forks once per program. Standard library
only.

It never reads a program and never holds an expected value. Each program gets process, mount and IPC namespaces of its
own, an empty /tmp and /proc, hard limits, no capabilities and a system-call filter; when its first process ends, all of
them do.

    python zygote.py CONTROL_FD bwrap              # inside bubblewrap, in the root that world.py made: all of the above
    python zygote.py CONTROL_FD landlock FILES     # no namespaces: a folder of its own, Landlock, limits and the filter; FILES: what
                                                   # programs may read, from world.py, with colons between
    python zygote.py CONTROL_FD none               # limits only (the backend `unsafe-subprocess`)
"""

import array
import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time

import counter  # this folder's
import landlock
import program  # what the program's own process does
import seccomp
from kernel import as_filter, check, drop_capabilities, libc

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID = 0x00020000, 0x08000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_RDONLY = 2, 4, 1
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = (
    1,
    4,
    22,
    36,
    38,
    47,
)
ENDED = struct.Struct("<iqq")  # wait status, peak in KiB, instructions or -1
PAGE = os.sysconf("SC_PAGE_SIZE")
WATCH_SECONDS = 0.02  # how often the memory and the processor time of forking programs are added up
STUCK_SECONDS = 2.0  # a killed program that is still there after this (waiting for a disk, say) costs its jail
SOCKET_BYTES = 1 << 18  # what one socket or pipe can hold by default: net.core.wmem_default, or 64 KiB
JAIL_BYTES = 64 << 20  # the interpreter and its library in memory (world.py), and this process
SIGNALS = 1024  # queued signals and timers

libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]


def make_filter(fork):
    return as_filter(seccomp.program(fork, unix=ISOLATED))


def address_space(limits):
    """Bytes of the memory limit that are left for a program's own pages, when the jail, the program's files, its
    sockets and its pipes (as many again may be on their way inside another) have taken their share."""
    share = 2 * limits["files"] * SOCKET_BYTES + (limits["disk_bytes"] + JAIL_BYTES if ISOLATED else 0)
    return limits["memory_bytes"] - min(share, limits["memory_bytes"] // 4)


def drop_everything(limits, readable):
    """Limits, then capabilities, then the filter: after this the process is the program's.

    `readable`: a Landlock ruleset, or None.
    """
    for name, soft, hard in (
        ("CPU", limits["cpu_seconds"], limits["cpu_seconds"] + 1),
        ("AS", ADDRESS_SPACE + address_space(limits), None),
        ("FSIZE", limits["file_bytes"], None),
        ("NOFILE", limits["files"], None),
        ("NPROC", limits["processes"], None),
        ("CORE", 0, None),
        ("MEMLOCK", 0, None),
        ("MSGQUEUE", 0, None),
        ("SIGPENDING", SIGNALS, None),
    ):
        if name == "NPROC" and not ISOLATED:
            continue  # counted over all of the user's processes: outside a jail it would count the trainer's
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (soft, soft if hard is None else hard))
    if not FILTERS:
        return
    drop_capabilities()
    libc.prctl(PR_CAP_AMBIENT, 4, 0, 0, 0)
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if readable is not None:
        landlock.restrict(readable)
        here = {os.getcwd(): landlock.CHANGE, "/dev/null": landlock.CHANGE}
        landlock.restrict(landlock.ruleset(landlock.CHANGE, here))
    check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(FILTERS[bool(limits["fork"])]), 0, 0), "seccomp")


def first_process(limits, fds, report):
    """Process 1 of the program's namespaces: an empty world, one child, and the report of how it ended."""
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
    if ISOLATED:
        size = b"size=%d,nr_inodes=%d,mode=1777" % (limits["disk_bytes"], limits["disk_files"])
        check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, size), "mount /tmp")
        nothing = b"size=0,nr_inodes=2,mode=555"
        check(libc.mount(b"tmpfs", b"/proc", b"tmpfs", MS_NOSUID | MS_NODEV | MS_RDONLY, nothing), "mount /proc")
        os.chdir("/tmp")
    elif MODE == "landlock":
        os.mkdir(OWN_FOLDER)
        os.chdir(OWN_FOLDER)
        os.environ["TMPDIR"] = os.environ["HOME"] = OWN_FOLDER
    counting = counter.start()
    child = os.fork()
    if child == 0:
        the_program(limits, fds, report)
    for fd in fds:
        os.close(fd)
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid == child:
            break
    os.write(report, b"E" + ENDED.pack(status, usage.ru_maxrss, counter.read(counting)))
    os._exit(0)


def the_program(limits, fds, report):
    request, result, stdin, stdout, stderr = fds[:5]
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
    os.setsid()
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    # high first, so that no number is overwritten before it is copied
    wanted = (request, result, *fds[5:], report, *([] if READABLE is None else [READABLE]))
    kept = [os.dup2(fd, to) for to, fd in enumerate(wanted, 100)]
    os.closerange(3, 100)
    os.closerange(kept[-1] + 1, 256)
    for to, fd in enumerate(kept, 10):
        os.dup2(fd, to)
    ready = 12 + len(fds[5:])
    os.closerange(100, 256)
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    drop_everything(limits, None if READABLE is None else ready + 1)
    os.write(ready, b"R")  # from here on, whatever happens is the program's doing
    os.close(ready)
    program.run(10, 11, 12 if len(fds) > 5 else None)


def memory_in_use(mine):
    """Bytes that belong to the programs alone, over all their processes. `mine`: ids of the trusted processes."""
    total = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in mine:
            try:
                with open("/proc/%s/status" % name) as file:
                    for line in file:
                        if line.startswith(("RssAnon:", "RssShmem:")):
                            total += int(line.split()[1]) * 1024
            except (OSError, IndexError):
                pass  # it ended meanwhile
    return total


def seconds_in_use(mine, exactly):
    """Processor time of the programs' living processes and of their children that are gone. `mine`: as above."""
    total = 0.0
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in mine:
            try:
                with open("/proc/%s/stat" % name) as file:
                    ticks = sum(map(int, file.read().rpartition(")")[2].split()[11:15])) / os.sysconf("SC_CLK_TCK")
                threads = 0
                for thread in os.listdir("/proc/%s/task" % name) if exactly else ():
                    with open("/proc/%s/task/%s/schedstat" % (name, thread)) as file:
                        threads += int(file.read().split()[0])
                total += max(ticks, threads / 1e9)  # whole ticks count dead threads, nanoseconds the living ones
            except (OSError, IndexError, ValueError):
                pass  # it ended meanwhile
    return total


def serve(limits, fds):
    """Run one program to its end; returns the report, whose contents no program can write."""
    report = os.pipe()
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    keeper = keep(limits, fds, report)
    for fd in (*fds, report[1]):
        os.close(fd)
    trusted = {1, os.getpid(), keeper}
    ended_by, lost = watch(keeper, trusted, limits, began + limits["wall_seconds"]), 0.0
    if ended_by is not None:
        if ISOLATED:  # a namespace that is torn down takes the account of its processes with it
            lost = seconds_in_use(trusted, exactly=True)
        os.kill(keeper, signal.SIGKILL)  # and with it process 1, and with that everything in its namespace
    stuck = not reap(STUCK_SECONDS)  # only when nothing of the program is left may the next one come
    if MODE == "landlock" and not stuck:
        remove(OWN_FOLDER)
    said = describe(contents(report[0]), ended_by, time.monotonic() - began)
    said["stuck"] = stuck
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of everything that ran for this program and is gone: what was killed, what its children's children did
    said["cpu_seconds"] = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime + lost
    return said


def keep(limits, fds, report):
    """Fork the process that makes a program's namespaces and waits for its first process; its id.

    `report`: both ends of a pipe.
    """
    keeper = os.fork()
    if keeper:
        return keeper
    try:
        control.close()
        os.close(report[0])
        check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
        if ISOLATED:
            check(libc.unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC), "unshare")
        first = os.fork()
        if first == 0:
            try:
                first_process(limits, fds, report[1])
            except BaseException as error:
                os.write(report[1], b"F" + repr(error).encode()[:400])
            finally:
                os._exit(120)
        for fd in (*fds, report[1]):
            os.close(fd)
        os.waitpid(first, 0)
        os._exit(0)
    except BaseException as error:
        os.write(report[1], b"F" + repr(error).encode()[:400])
    finally:
        os._exit(121)


def watch(keeper, trusted, limits, end):
    """Wait for a program's end. None, or why it must be ended: `timeout`, `cancelled`, `memory`."""
    keeper_fd, poll = os.pidfd_open(keeper), select.poll()
    poll.register(keeper_fd, select.POLLIN)
    poll.register(control, select.POLLIN)
    try:
        while True:
            left = end - time.monotonic()
            if left <= 0:
                return "timeout"
            events = poll.poll(1000 * (min(left, WATCH_SECONDS) if limits["fork"] else left))
            if any(fd == keeper_fd for fd, _ in events):
                return None
            if events:  # the host no longer needs the result
                control.recv(64)
                return "cancelled"
            if limits["fork"] and ISOLATED:  # the limits of the kernel are for each process
                if memory_in_use(trusted) > address_space(limits):
                    return "memory"
                if seconds_in_use(trusted, exactly=False) > limits["cpu_seconds"]:
                    return "timeout"
    finally:
        os.close(keeper_fd)


def contents(fd):
    """What a pipe holds, without waiting for more: what is stuck may still hold its other end."""
    os.set_blocking(fd, False)
    text = bytearray()
    try:
        while part := os.read(fd, 4096):
            text += part
    except BlockingIOError:
        pass
    os.close(fd)
    return bytes(text)


def remove(folder):
    """Delete a program's folder, whatever it made there; a jail that cannot ends, and is started anew with a fresh one."""
    if not os.path.lexists(folder):
        return
    os.chmod(folder, 0o700)
    moved = 0
    folders = [folder]
    while folders:  # no recursion: nesting is the program's to choose
        here = folders.pop()
        for entry in list(os.scandir(here)):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            if here != folder:  # up to the top, so that no path grows too long
                moved += 1
                os.rename(entry.path, os.path.join(folder, ".%d" % moved))
            folders.append(entry.path if here == folder else os.path.join(folder, ".%d" % moved))
        if here != folder:
            os.rmdir(here)
    os.rmdir(folder)


def reap(seconds):
    """Wait until every process below this one is gone; False if that takes longer.

    Orphans come to us (we are their subreaper), and are killed.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                if time.monotonic() > end:
                    return False
                kill_children()
        except ChildProcessError:
            return True


def kill_children():
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/%s/stat" % name) as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
                if parent == os.getpid():
                    os.kill(int(name), signal.SIGKILL)
            except (OSError, IndexError, ValueError):
                pass
    time.sleep(0.001)


def describe(text, ended_by, seconds):
    """The report's records, in the order they may come: R(eady), E(nded) or F(ailed) with its reason."""
    out = {"ended_by": ended_by, "seconds": seconds, "ready": False, "ended": False}
    at = 0
    while at < len(text):
        kind, at = text[at : at + 1], at + 1
        if kind == b"R":
            out["ready"] = True
        elif kind == b"E":
            status, peak, count = ENDED.unpack(text[at : at + ENDED.size])
            out.update(ended=True, status=status, max_rss_bytes=peak * 1024, instructions=count)
            at += ENDED.size
        else:
            out["failure"] = text[at:].decode("utf-8", "replace")
            break
    return out


control = socket.socket(fileno=int(sys.argv[1]))
MODE = sys.argv[2]
ISOLATED = MODE == "bwrap"  # in namespaces of its own
OWN_FOLDER = os.path.join(os.getcwd(), "own", "work")
sys.path.pop(0)
libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
if not ISOLATED:  # bubblewrap does this for its own
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
FILTERS = {fork: make_filter(fork) for fork in (False, True)} if MODE != "none" else {}
READABLE = None
if MODE == "landlock":
    landlock.require()
    os.mkdir(os.path.dirname(OWN_FOLDER))
    allowed = dict.fromkeys(sys.argv[3].split(":"), landlock.LOOK)
    allowed |= {os.path.dirname(OWN_FOLDER): landlock.ALL_FILES, "/dev/null": landlock.ALL_FILES}
    READABLE = landlock.ruleset(landlock.ALL_FILES, allowed)
with open("/proc/self/statm") as statm:
    ADDRESS_SPACE = int(statm.read().split()[0]) * PAGE
gc.collect()
gc.freeze()
control.send(b"ready")
while True:
    message, ancillary, _, _ = control.recvmsg(65536, socket.CMSG_SPACE(4 * 8))
    if not message:
        break
    descriptors = array.array("i")
    for _level, kind, data in ancillary:
        if kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % 4])
    if not descriptors:
        continue  # a cancellation that came after the program's end
    said = serve(json.loads(message), list(descriptors))
    control.send(json.dumps(said).encode())
    if said["stuck"]:
        os._exit(1)
