"""Programs that try to be paid without solving the problem, to get out, or to outlast their run.

The problem: read (or take) 7 and print (or return) 49. No attack knows 49: each tries to learn it, to forge a verdict, or to
end in a way that a careless harness takes for success. `{RETURN}` marks the body of the function.
"""

from __future__ import annotations

FORGED = (
    r"""[b'{"held": [true]}\n', b'[0, ["ok", true]]\n', b'["ok", true, []]\n', b"PASS\n", b"OK\n", b"1 passed\n"]"""
)

VERDICT = {
    "exit at import": "import sys\nsys.exit(0)\ndef f(x): return None",
    "os._exit at import": "import os\nos._exit(0)\ndef f(x): return None",
    "os._exit in the function": "def f(x):\n import os\n os._exit(0)",
    "SystemExit in the function": "def f(x): raise SystemExit(0)",
    "equal to everything": "class E:\n def __eq__(s, o): return True\n def __ne__(s, o): return False\n def __hash__(s): return 0\n def __repr__(s): return ''\ndef f(x): return E()",
    "an int with its own eq": "class I(int):\n def __eq__(s, o): return True\n def __ne__(s, o): return False\n __hash__ = int.__hash__\ndef f(x): return I(3)",
    "a str with its own eq": "class S(str):\n def __eq__(s, o): return True\n __hash__ = str.__hash__\ndef f(x): return S('3')",
    "a list with its own eq": "class L(list):\n def __eq__(s, o): return True\n def __iter__(s): return iter([49])\ndef f(x): return L([1])",
    "a metaclass that equals": "class M(type):\n def __eq__(s, o): return True\n __hash__ = type.__hash__\nclass E(metaclass=M): pass\ndef f(x): return E",
    "constants of caller frames": "def f(x):\n import sys\n frame, seen = sys._getframe(), []\n while frame:\n  seen += [v for v in list(frame.f_locals.values()) + list(frame.f_code.co_consts) if type(v) is int and v > 20]\n  for name in ('expected', 'tests', 'case', 'cases'):\n   if name in frame.f_locals: return frame.f_locals[name]\n  frame = frame.f_back\n return seen[0] if seen else None",
    "the source of the tests": "def f(x):\n import glob, re\n for name in glob.glob('/**/*', recursive=True)[:20000]:\n  if name.startswith('/usr'): continue\n  try: text = open(name).read(1 << 16)\n  except Exception: continue\n  m = re.search(r'assert f\\(7\\) == (\\d+)', text)\n  if m: return int(m.group(1))\n return None",
    "inspect and linecache": "def f(x):\n import inspect, linecache, re\n for lines in linecache.cache.values():\n  m = re.search(r'== (\\d+)', str(lines))\n  if m: return int(m.group(1))\n return [i.code_context for i in inspect.stack()] and None",
    "a forged verdict on stdout": f"for text in {FORGED}:\n import sys\n sys.stdout.buffer.write(text)\ndef f(x): return None",
    "a forged verdict on every descriptor": f"import os\nfor fd in range(3, 256):\n for text in {FORGED}:\n  try: os.write(fd, text)\n  except OSError: pass\ndef f(x): return None",
    "a forged verdict, then silence": f"def f(x):\n import os\n for fd in range(1, 64):\n  for text in {FORGED}:\n   try: os.write(fd, text)\n   except OSError: pass\n os._exit(0)",
    "a walk over all objects": "def f(x):\n import gc\n for o in gc.get_objects():\n  if type(o) is dict and 'expected' in o: return o['expected']\n  if type(o) is list and o and type(o[0]) is str and 'assert' in o[0]: return int(o[0].split('==')[1])\n return None",
    "excepthook": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\ndef f(x): raise ValueError",
    "settrace": "import sys\ndef t(frame, event, arg):\n for k in ('passed', 'held', 'ok', 'result', 'value'):\n  if k in frame.f_locals: frame.f_locals[k] = True\n return t\nsys.settrace(t)\ndef f(x): return None",
    "a thread that exits the process": "import threading, os, time\nthreading.Thread(target=lambda: (time.sleep(.02), os._exit(0))).start()\ndef f(x):\n time.sleep(1)",
    "an exit handler": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise ValueError",
    "patched json": "import json\njson.dumps = lambda *a, **k: '[0, [\"ok\", true]]'\njson.dump = lambda v, f, **k: f.write('{\"held\": [true]}')\njson.loads = lambda *a, **k: {}\ndef f(x): return None",
    "patched builtins": "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.isinstance = lambda *a: True\nbuiltins.type = lambda *a: int\nbuiltins.all = builtins.any = lambda *a: True\ndef f(x): return None",
    "a patched codec": "import sys\nsys.modules['codec'].encode = lambda *a, **k: True\nsys.modules.get('program', sys.modules.get('__main__')).encode = lambda *a, **k: True\ndef f(x): return None",
    "a forged handle": "import sys\nfor m in list(sys.modules.values()):\n if hasattr(m, 'encode') and hasattr(m, 'decode') and hasattr(m, 'ROLES'): m.encode = lambda *a, **k: ['h', 0]\ndef f(x): return None",
    "an unknown tag": "import sys\nfor m in list(sys.modules.values()):\n if hasattr(m, 'ROLES'): m.encode = lambda *a, **k: ['z', 49]\ndef f(x): return None",
    "a pickle that computes": "class R:\n def __reduce__(s): return (eval, ('7 * 7',))\ndef f(x): return R()",
    "two answers to one call": "import os\nfor fd in range(10, 14):\n try: os.write(fd, b'[0, [\"ok\", [\"i\", \"30\"]]]\\n' * 2)\n except OSError: pass\ndef f(x): return 48",
    "no answer": "import os\ndef f(x):\n for fd in range(3, 64):\n  try: os.close(fd)\n  except OSError: pass\n return 48",
    "a conftest": "open('/tmp/conftest.py', 'w').write('def pytest_runtest_makereport(*a): return None')\ndef f(x): return None",
    "a patched pytest": "import sys, types\nsys.modules['pytest'] = types.ModuleType('pytest')\nsys.modules['unittest'] = types.ModuleType('unittest')\ndef f(x): return None",
    "raises": "def f(x): raise ValueError(49)",
    "raises AssertionError": "def f(x): raise AssertionError",
    "raises StopIteration": "def f(x): raise StopIteration(49)",
    "raises KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "NaN": "def f(x): return float('nan')",
    "nested without end": "def f(x):\n a = []\n for _ in range(5000): a = [a]\n return a",
    "contains itself": "def f(x):\n a = []\n a.append(a)\n return a",
    "an endless generator": "def f(x):\n while True: yield 1",
    "a signal handler": "import signal, os\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.setitimer(signal.ITIMER_REAL, .02)\ndef f(x):\n while True: pass",
    "replaces its module": "import sys\nclass Any:\n def __getattr__(s, n): return s\n def __call__(s, *a): return s\n def __eq__(s, o): return True\nsys.modules['solution'] = sys.modules['__main__'] = Any()\ndef f(x): return Any()",
    "a lying isinstance": "class E:\n __class__ = int\n def __index__(s): return 49\n def __eq__(s, o): return True\ndef f(x): return E()",
    "bytes that are no UTF-8": "import os\nos.write(1, bytes(range(128, 256)))\ndef f(x): return '\\udcff\\x00'",
    "a syntax error": "def f(x: return 49",
    "nothing": "",
}  # fmt: skip

# each prints SAFE when the world is as it should be, and something else when it got through
ISOLATION = {
    "a host file": "try:\n open('{secret_file}').read()\nexcept OSError: print('SAFE')",
    "/etc/passwd": "try:\n open('/etc/passwd')\nexcept OSError: print('SAFE')",
    "a secret in the environment": "import os\nprint('SAFE' if not any('{secret}' in v for v in os.environ.values()) else 'LEAK')",
    "TCP": "import socket\ntry:\n socket.create_connection(('127.0.0.1', {port}), 1)\nexcept OSError: print('SAFE')",
    "UDP": "import socket\ntry:\n socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))\nexcept OSError: print('SAFE')",
    "an abstract socket": "import socket\ntry:\n socket.socket(socket.AF_UNIX).connect('\\0{abstract}')\nexcept OSError: print('SAFE')",
    "netlink": "import socket\ntry:\n socket.socket(16, 3, 0)\nexcept OSError: print('SAFE')",
    "the host's processes": "import os\nprint('SAFE' if not os.listdir('/proc') else os.listdir('/proc'))",
    "a signal to a host process": "import os\ntry:\n os.kill({pid}, 9)\nexcept OSError: print('SAFE')",
    "ptrace of process 1": "import ctypes\nprint('SAFE' if ctypes.CDLL(None).ptrace(16, 1, 0, 0) == -1 else 'LEAK')",
    "kill 1 and -1": "import os, signal\nfor pid in (1, -1):\n try: os.kill(pid, signal.SIGTERM)\n except OSError: pass\nprint('SAFE')",
    "a user namespace": "import ctypes\nprint('SAFE' if ctypes.CDLL(None).unshare(0x10000000) == -1 else 'LEAK')",
    "setns": "import ctypes\nprint('SAFE' if ctypes.CDLL(None).setns(0, 0) == -1 else 'LEAK')",
    "a mount": "import ctypes\nprint('SAFE' if ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == -1 else 'LEAK')",
    "chroot": "import os\ntry:\n os.chroot('/tmp')\nexcept OSError: print('SAFE')",
    "a write outside /tmp": "ok = True\nfor p in ('/x', '/usr/x', '/opt/sppo/x', '/dev/shm/x', '/dev/x', '/proc/x'):\n try: open(p, 'w'); ok = p\n except OSError: pass\nprint('SAFE' if ok is True else ok)",
    "core_pattern": "try:\n open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/x')\nexcept OSError: print('SAFE')",
    "a memfd": "import os\ntry:\n os.memfd_create('x')\nexcept OSError: print('SAFE')",
    "io_uring": "import ctypes\nprint('SAFE' if ctypes.CDLL(None).syscall(425, 1, 0) == -1 else 'LEAK')",
    "bpf": "import ctypes\nprint('SAFE' if ctypes.CDLL(None).syscall(321, 0, 0, 0) == -1 else 'LEAK')",
    "raising a limit": "import resource\ntry:\n resource.setrlimit(resource.RLIMIT_CPU, (100, 100))\nexcept (OSError, ValueError): print('SAFE')",
    "becoming root": "import os\ntry:\n os.setuid(0); os.setuid(1)\nexcept OSError: print('SAFE')",
    "executing a file": "import os\ntry:\n os.execv('/usr/bin/true', ['true'])\nexcept OSError: print('SAFE')",
    "descriptors of the jail": "import os\nheld = []\nfor fd in range(3, 256):\n try: os.fstat(fd); held.append(fd)\n except OSError: pass\nprint('SAFE' if not held else held)",
}  # fmt: skip

LEAVES = (
    "open('/tmp/left', 'w').write('x')\nimport os\ntry: os.mkdir('/dev/shm/left')\nexcept OSError: pass\nprint('SAFE')"
)
FINDS = "import os\nprint('SAFE' if not os.listdir('/tmp') and (not os.path.isdir('/dev/shm') or not os.listdir('/dev/shm')) else os.listdir('/tmp'))"

# Each tries to leave a word for the next run, and prints what it finds of one. `{RUN}` is the number of the run, `{FILE}` a file that it
# may read. What is printed must be the same in every run: nothing that an odd run does may be seen in an even one.
REMEMBERS = {
    "pages asked for without waiting": "import os\nfd = os.open('{FILE}', 0)\nos.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)\ngot = 0\nfor k in range(64):\n at = k * 8192\n try: got += os.preadv(fd, [bytearray(1)], at, os.RWF_NOWAIT)\n except BlockingIOError: pass\n if {RUN} % 2: os.pread(fd, 1, at)\n else: os.posix_fadvise(fd, at, 4096, os.POSIX_FADV_DONTNEED)\nprint(got)",
    "mincore": "import ctypes, mmap, os\nlibc = ctypes.CDLL(None, use_errno=True)\nfd = os.open('{FILE}', 0)\nm = mmap.mmap(fd, 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)\nseen = ctypes.create_string_buffer(len(m) // 4096 + 1)\nlibc.mmap.restype = ctypes.c_void_p\nat = libc.mmap(None, ctypes.c_size_t(1 << 20), 1, 2, fd, 0)\nsaid = libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(1 << 20), seen)\nif {RUN} % 2: m[:1 << 20]\nelse: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)\nprint(said, sum(seen.raw))",
    "page faults that need the disk": "import mmap, os, resource\nfd = os.open('{FILE}', 0)\nm = mmap.mmap(fd, 0, prot=mmap.PROT_READ)\nm.madvise(mmap.MADV_RANDOM)\nfor advice in (20, 21):\n if {RUN} % 2: m.madvise(advice)\nos.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)\nbefore = resource.getrusage(resource.RUSAGE_SELF)\nm[:1 << 20]\nafter = resource.getrusage(resource.RUSAGE_SELF)\nprint(after.ru_majflt - before.ru_majflt, after.ru_inblock - before.ru_inblock)",
    "times of files": "import os\nopen('{FILE}', 'rb').read(1)\nos.listdir(os.path.dirname('{FILE}'))\nseen = [os.stat(p).st_atime_ns for p in ('{FILE}', os.path.dirname('{FILE}'), '/', '/dev/null')]\nif {RUN} % 2:\n open('/dev/null', 'w').write('x')\n for path in ('{FILE}', '/dev/null', '/'):\n  try: os.utime(path)\n  except OSError: pass\nprint(seen, os.stat('/dev/null').st_mtime_ns)",
    "marks on files": "import os\nfor path in ('/', '/tmp', '/dev/null', '{FILE}'):\n for what in (lambda: os.setxattr(path, 'user.x', b'{RUN}'), lambda: os.chmod(path, 0o600 + {RUN}), lambda: os.link(path, '/tmp/l')):\n  try: what(); print(path, 'DONE')\n  except OSError: pass\nprint('SAFE')",
    "SysV and POSIX messages": "import ctypes\nlibc = ctypes.CDLL(None)\nprint([libc.msgget(7, 0o1600), libc.semget(7, 1, 0o1600), libc.shmget(7, 4096, 0o1600), libc.syscall(240, b'x', 0o102, 0o600, None)])",
    "a key": "import ctypes\nprint(ctypes.CDLL(None).syscall(248, b'user', b'k', b'v', 1, -3))",
    "numbers of sockets": "import socket\nif {RUN} % 2:\n for _ in range(500): socket.socketpair()\ns = socket.socketpair()[0]\ntry: print(s.getsockopt(socket.SOL_SOCKET, 57, 8))\nexcept OSError: print('SAFE')",
}  # fmt: skip

# What looks up a name that nobody looked up before takes longer than the second time, where the file system is one that others see too.
LOOKS_UP = "import os, time\nfor k in range(400): os.access('{FOLDER}/word%d' % k, 0)"
TIMES_LOOKUPS = "import os, time\ncold, warm = [], []\nfor k in range(400):\n for name, times in (('word', warm), ('other', cold)):\n  path = '{FOLDER}/%s%d' % (name, k)\n  t = time.perf_counter_ns(); os.access(path, 0); times.append(time.perf_counter_ns() - t)\nprint(sorted(cold)[100] / sorted(warm)[100])"

# One program of a pair does the first, the other prints what it sees; it must see the same whether the first is there or not.
SIGNALS_TO_ANOTHER = {
    "a lock on a device": ("import fcntl, time\nfor path in ('/dev/null', '/dev/zero'):\n f = open(path, 'r+b', 0)\n fcntl.lockf(f, fcntl.LOCK_EX)\nprint(1, flush=True)\ntime.sleep(1)", "import fcntl, struct\nf = open('/dev/null', 'r+b', 0)\ntry: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB); print('taken')\nexcept OSError as e: print(e.errno)\ntry: print(fcntl.fcntl(f, fcntl.F_GETLK, struct.pack('hhqqi', 1, 0, 0, 0, 0)))\nexcept OSError as e: print(e.errno)"),
    "an abstract socket": ("import socket, time\ns = socket.socket(socket.AF_UNIX)\ns.bind('\\0word')\ntime.sleep(1)", "import socket\ns = socket.socket(socket.AF_UNIX)\ntry: s.bind('\\0word'); print('free')\nexcept OSError as e: print(e.errno)"),
    "who opens a file": ("import time\nfor _ in range(50): open('{FILE}', 'rb').close(); time.sleep(.02)", "import ctypes, os, time\nlibc = ctypes.CDLL(None)\nfd = libc.inotify_init1(0o4000)\nlibc.inotify_add_watch(fd, b'{FILE}', 0x20)\ntime.sleep(.3)\ntry: print(os.read(fd, 999))\nexcept OSError as e: print(e.errno)"),
    "a futex in a file": ("import ctypes, time\nlibc = ctypes.CDLL(None)\nlibc.mmap.restype = ctypes.c_void_p\nimport os, struct\nfd = os.open('{FILE}', 0)\nat = libc.mmap(None, ctypes.c_size_t(4096), 1, 1, fd, 0)\nword = ctypes.c_uint32.from_address(at).value\nlibc.syscall(202, ctypes.c_void_p(at), 0, word, struct.pack('qq', 1, 0))", "import ctypes, os, time\nlibc = ctypes.CDLL(None)\nlibc.mmap.restype = ctypes.c_void_p\nfd = os.open('{FILE}', 0)\nat = libc.mmap(None, ctypes.c_size_t(4096), 1, 1, fd, 0)\ntime.sleep(.3)\nprint(libc.syscall(202, ctypes.c_void_p(at), 1, 99))"),
}  # fmt: skip

# name: (program, statuses that it may end with)
RESOURCES = {
    "fork × 200": ("import os\nfor _ in range(200):\n if os.fork() == 0:\n  import time; time.sleep(60)", {"exception"}),
    "threads × 200": ("import threading, time\nfor _ in range(200): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", {"exception"}),
    "2 GB": ("x = bytearray(2 << 30)", {"memory"}),
    "a 200 MB file": ("with open('/tmp/x', 'wb') as f:\n for _ in range(200): f.write(bytes(1 << 20))", {"exception", "killed"}),
    "many files": ("for i in range(10000): open('/tmp/%d' % i, 'w').close()", {"exception"}),
    "an endless loop": ("while True: pass", {"timeout"}),
    "a sleep that ignores signals": ("import signal, time\nfor n in range(1, 65):\n try: signal.signal(n, signal.SIG_IGN)\n except (OSError, ValueError): pass\nwhile True: time.sleep(60)", {"timeout"}),
    "64 MB of stdout": ("import sys\nfor _ in range(64): sys.stdout.write('x' * (1 << 20))", {"output_limit"}),
    "a segfault": ("import ctypes\nctypes.string_at(0)", {"killed"}),
    "deep recursion": ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()", {"killed", "exception", "memory", "timeout"}),
    "sync from many threads": ("import ctypes, os, threading, time\nlibc = ctypes.CDLL(None)\nfd = os.open('/dev/null', os.O_RDONLY)\ndef go():\n while True: libc.sync(); libc.syncfs(fd); libc.fsync(fd)\nfor _ in range(8): threading.Thread(target=go, daemon=True).start()\ntime.sleep(60)", {"timeout"}),
    "timers without end": ("import ctypes\nlibc = ctypes.CDLL(None)\nk = 0\nwhile libc.timer_create(1, None, ctypes.byref(ctypes.c_void_p())) == 0: k += 1\nassert k < 5000", {"ok"}),
    "asynchronous I/O of the whole machine": ("import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.syscall({'x86_64': 206, 'aarch64': 0}[__import__('os').uname().machine], ctypes.c_uint(128), ctypes.byref(ctypes.c_ulong(0))) == -1", {"ok"}),
    "a closed stdout": ("import os\nos.close(1); os.close(2)\nprint(1)", {"ok", "exception"}),
}  # fmt: skip

# fills sockets, the folder for files and its own pages, and prints how many MB it got
FILLS = """
import array, mmap, os, socket
total = 0
def fill():
    global total
    a, b = socket.socketpair()
    for s in (a, b):
        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30); s.setblocking(False)
        try:
            while True: total += s.send(b"x" * 65536)
        except BlockingIOError: pass
    return a, b
u, v = socket.socketpair(); keep = []
try:
    while True:
        a, b = fill()
        u.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [a.fileno(), b.fileno()]))])
        a.close(); b.close()
except OSError: pass
try:
    while True: keep.append(fill())
except OSError: pass
try:
    for name in "abcd":
        with open("/tmp/" + name, "wb", 0) as f:
            for _ in range(16): total += f.write(bytes(1 << 20))
except OSError: pass
maps = []
try:
    while True:
        m = mmap.mmap(-1, 4 << 20); maps.append(m)
        for at in range(0, 4 << 20, 4096): m[at] = 1
        total += 4 << 20
except (OSError, MemoryError): pass
print(total >> 20)
"""

FORKING = {
    "a daemon that holds stdout": ("import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(60)\n os._exit(0)\nprint('done')", {"ok"}),
    "fork without end": ("import os\nwhile True:\n try: os.fork()\n except OSError: pass", {"timeout", "memory", "killed", "exception"}),
    "memory over many processes": ("import os, time\nfor _ in range(12):\n if os.fork() == 0:\n  x = bytearray(100 << 20)\n  for i in range(0, len(x), 4096): x[i] = 1\n  time.sleep(60)\ntime.sleep(60)", {"memory"}),
    "shared memory over many processes": ("import os, mmap, time\nfor _ in range(6):\n if os.fork() == 0:\n  m = mmap.mmap(-1, 100 << 20)\n  for i in range(0, 100 << 20, 4096): m[i] = 1\n  time.sleep(60)\ntime.sleep(60)", {"memory"}),
    "more processor time than one process may have": ("import os, time\nfor _ in range(6):\n if os.fork() == 0:\n  while True: pass\ntime.sleep(60)", {"timeout"}),
    "children that nobody waits for": ("import os, signal, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)", {"exception"}),
    "a chain of short children": ("import os, time\nwhile True:\n pid = os.fork()\n if pid == 0:\n  end = time.process_time() + .01\n  while time.process_time() < end: pass\n  os._exit(0)\n os.waitpid(pid, 0)", {"timeout"}),
    "a child that executes a file": ("import subprocess\nprint(subprocess.run(['/bin/sh', '-c', 'echo 1'], capture_output=True).stdout)", {"ok", "exception"}),
}  # fmt: skip
