"""The files of a working folder that changed, so that both jails of `asserts` see the same ones."""

import contextlib
import os
import stat

LARGEST_FILES = 4 << 20


class Folder:
    """The regular files and folders below the working folder, and how they changed since they were last looked at."""

    def __init__(self):
        self.root = os.getcwd()
        self.seen = self.look()

    def look(self):
        found = {}
        for at, folders, files in os.walk(self.root):
            for name in (*folders, *files):
                path = os.path.join(at, name)
                status = os.lstat(path)
                if stat.S_ISDIR(status.st_mode):
                    found[os.path.relpath(path, self.root)] = None
                elif stat.S_ISREG(status.st_mode):
                    found[os.path.relpath(path, self.root)] = (status.st_mtime_ns, status.st_size, status.st_ino)
        return found

    def changes(self):
        """`[path, "file" | "folder" | "gone", bytes as hexadecimal]`, folders before what is in them."""
        now = self.look()
        changed = []
        room = LARGEST_FILES
        for path, status in sorted(now.items()):
            if path in self.seen and self.seen[path] == status:
                continue
            data = b""
            if status is not None:
                room -= status[1]
                if room < 0:
                    raise ValueError("the files hold more than %d bytes" % LARGEST_FILES)
                with open(os.path.join(self.root, path), "rb") as file:
                    data = file.read(LARGEST_FILES)
            changed.append([path, "folder" if status is None else "file", data.hex()])
        changed += [[path, "gone", ""] for path in sorted(self.seen, reverse=True) if path not in now]
        self.seen = now
        return changed

    def apply(self, changes):
        """Make the other side's changes here. Raises ValueError for a path that leads out of the folder."""
        for path, kind, data in changes:
            if os.path.isabs(path) or ".." in path.split("/"):
                raise ValueError("a path leads out of the folder")
            here = os.path.join(self.root, path)
            if kind == "folder":
                os.makedirs(here, exist_ok=True)
            elif kind == "gone":
                with contextlib.suppress(OSError):
                    (os.rmdir if os.path.isdir(here) else os.unlink)(here)
            else:
                with open(os.open(here, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644), "wb") as file:
                    file.write(bytes.fromhex(data))
        if changes:
            self.seen = self.look()
