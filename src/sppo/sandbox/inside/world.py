"""Runs first in a jail: finds what the interpreter needs, removes everything else from view, and becomes the zygote.

Two runs that share a file can pass information through it: page cache, name lookups, locks. So a bwrap jail gets a file
system of its own, in memory, with a copy of the interpreter, its standard library and the libraries of both; the
machine's files are unmounted before the first program comes. Under Landlock the same files, and no others, stay
readable in place.

    python world.py CONTROL_FD bwrap         # inside bubblewrap
    python world.py CONTROL_FD landlock      # in a folder of its own
"""

import ctypes
import os
import sys

CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MNT_DETACH = 1, 2, 4, 32, 4096, 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
LEFT_OUT = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "tkinter", "ensurepip", "posix", "right"
}  # fmt: skip
"""Folders that no program is promised: packages of others, tests, windows; second copies of the time zones."""
ZONES = "/usr/share/zoneinfo"
DEVICES = ("null", "zero", "full", "random", "urandom")
ROOT = "/opt/root"
"""Where the new root is made, before it becomes the root."""

libc = ctypes.CDLL(None, use_errno=True)


class Library(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("name", ctypes.c_char_p)]  # the head of struct dl_phdr_info


def libraries():
    """Paths of the shared libraries that the interpreter and its extension modules load, by the names that they are
    looked up with."""
    for folder in sys.path:
        for name in os.listdir(folder) if os.path.basename(folder) == "lib-dynload" else ():
            if not name.startswith(("_tkinter", "_test")):
                try:
                    ctypes.CDLL(os.path.join(folder, name))
                except OSError:
                    pass  # its library is not installed: it cannot be imported on this machine either
    found = set()

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Library), ctypes.c_size_t, ctypes.c_void_p)
    def note(library, _size, _data):
        name = os.fsdecode(library.contents.name or b"")
        if os.path.isfile(name):
            found.add(os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name)))
        return 0

    libc.dl_iterate_phdr(note, None)
    return sorted(found)


def needed():
    """Files and folders that programs are to see. Folders are seen with what is in them, less LEFT_OUT."""
    shell = os.path.join(os.path.realpath("/bin"), "sh")  # for os.system and subprocess, where programs may fork
    library = os.path.dirname(os.path.realpath(os.__file__))
    inside = [os.path.join(library, name) for name in sorted(os.listdir(library)) if wanted(name)]
    found = (os.path.realpath(sys.executable), shell, ZONES, *inside, *libraries())
    return [path for path in found if os.path.exists(path)]


def wanted(name):
    return name not in LEFT_OUT and not name.startswith("config-")  # config-…: a static library of 24 MB


def copy(source, target):
    """A file, or a folder with everything below it that is wanted.

    Links to files become files, links to folders are left out.
    """
    if not os.path.isdir(source):
        copy_file(source, target)
        return
    pending = [(source, target)]
    while pending:
        source, target = pending.pop()
        os.mkdir(target)
        with os.scandir(source) as inside:
            for entry in inside:
                there = target + "/" + entry.name
                if entry.is_dir(follow_symlinks=False) and wanted(entry.name):
                    pending.append((entry.path, there))
                elif entry.is_file():
                    copy_file(entry.path, there)


def copy_file(source, target):
    try:
        there = os.open(source, os.O_RDONLY)
        kind = os.fstat(there)
        here = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, kind.st_mode & 0o555)
    except (FileExistsError, PermissionError):
        return  # an extension module, which is a library too; a file that is not for everybody
    while os.sendfile(here, there, None, kind.st_size):
        pass
    os.utime(here, ns=(kind.st_mtime_ns, kind.st_mtime_ns))  # compiled modules name their source's time
    os.close(there)
    os.close(here)


def mount(kind, target, flags, source=None, options=None):
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    if libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]) != 0:
        raise OSError(ctypes.get_errno(), "mount %s: %s" % (target, os.strerror(ctypes.get_errno())))


def move_in():
    """Make a root in memory, copy what is needed, and let go of the machine's files."""
    if libc.unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare: %s" % os.strerror(ctypes.get_errno()))
    mount("tmpfs", ROOT, MS_NOSUID | MS_NODEV, "tmpfs", "mode=755")
    for link in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(link):
            os.symlink(os.readlink(link), ROOT + link)
    for path in (*needed(), os.path.dirname(os.path.abspath(__file__))):
        os.makedirs(os.path.dirname(ROOT + path), exist_ok=True)
        copy(path, ROOT + path)
    interpreter = os.path.realpath(sys.executable)
    for path in ("/usr/bin/python3", "/usr/bin/python"):
        os.makedirs(ROOT + "/usr/bin", exist_ok=True)
        if not os.path.lexists(ROOT + path):
            os.symlink(interpreter, ROOT + path)
    for folder in ("/tmp", "/proc", "/dev", "/dev/shm"):
        os.mkdir(ROOT + folder)
    for name in DEVICES:
        os.close(os.open(ROOT + "/dev/" + name, os.O_CREAT, 0o444))
        mount(None, ROOT + "/dev/" + name, MS_BIND, "/dev/" + name)
    mount(None, ROOT + "/proc", MS_BIND, "/proc")
    mount(None, ROOT, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(ROOT)
    if libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b".") != 0 or libc.umount2(b".", MNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), "pivot_root: %s" % os.strerror(ctypes.get_errno()))
    os.chdir("/")


if __name__ == "__main__":
    control, mode = sys.argv[1:3]
    here = sys.path.pop(0)
    seen = []
    if mode == "bwrap":
        move_in()
    else:
        seen = [*needed(), *("/dev/" + name for name in DEVICES)]
    python = os.path.realpath(sys.executable)
    zygote = os.path.join(here, "zygote.py")
    os.execv(python, [python, "-s", "-S", "-B", zygote, control, mode, ":".join(seen)])
