"""The system-call filter of a jailed program, assembled by hand for x86-64 and aarch64 (seccomp(2), classic BPF)."""

import errno
import platform
import signal
import struct

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
LAST_KNOWN = 449
"""Calls with a higher number came after this list was made: they do not exist for a program."""

# name: numbers on x86-64 and aarch64 (None where the architecture has no such call)
DENIED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "personality": (135, 92),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmctl": (31, 195), "shmat": (30, 196),
    "semget": (64, 190), "semop": (65, 193), "semtimedop": (220, 192), "semctl": (66, 191), "msgget": (68, 186),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "acct": (163, 89), "sethostname": (170, 161), "setdomainname": (171, 162), "syslog": (103, 116), "vmsplice": (278, 75),
    "ioperm": (173, None), "iopl": (172, None), "modify_ldt": (154, None), "vhangup": (153, 58),
    "lookup_dcookie": (212, 18), "nfsservctl": (180, 42), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    # marks on files that outlive a program, also on what is read-only or not its own folder's
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None),
    "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    # what is in the page cache, and who else opens a file: with such questions a file remembers for a program
    "mincore": (27, 232), "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    "fanotify_init": (300, 262), "fanotify_mark": (301, 263),
    # memory of the kernel's that is counted for nobody; of asynchronous I/O the whole machine has one small stock
    "io_setup": (206, 0), "io_destroy": (207, 1), "io_submit": (209, 2), "io_cancel": (210, 3), "io_getevents": (208, 4),
    "io_pgetevents": (333, 292), "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445), "seccomp": (317, 277),
    # how other processes run
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
}  # fmt: skip
# Succeed and do nothing: no file of a program's outlives it, so nothing has to reach a disk (a thread that waits for one cannot
# be killed); advice about caching may be ignored; nobody else can hold a lock.
NOTHING_DONE = {
    "sync": (162, 81), "syncfs": (306, 267), "fsync": (74, 82), "fdatasync": (75, 83), "sync_file_range": (277, 84),
    "msync": (26, 227), "fadvise64": (221, 223), "readahead": (187, 213), "flock": (73, 32),
}  # fmt: skip
FORK = {"fork": (57, None), "vfork": (58, None)}
EXEC = {"execve": (59, 221), "execveat": (322, 281)}
CLONE, CLONE3, SOCKET, SOCKETPAIR, IOCTL = (56, 220), (435, 435), (41, 198), (53, 199), (16, 29)
PRLIMIT, PRCTL, FCNTL, MADVISE, SIGACTION = (302, 261), (157, 167), (72, 25), (28, 233), (13, 134)
PREADV2, PWRITEV2, BIND, SETSOCKOPT, GETSOCKOPT = (327, 286), (328, 287), (49, 200), (54, 208), (55, 209)
NEW_NAMESPACES, THREAD = 0x7E020000 | 0x80, 0x10000
AF_UNIX, TIOCSTI, TIOCLINUX = 1, 0x5412, 0x541C
SET_DEATH_SIGNAL, SET_SECCOMP, SET_MEMORY_MERGE = 1, 22, 67
ADVICE = (3, 12, 20, 21)  # MADV_WILLNEED, _MERGEABLE, _COLD, _PAGEOUT: the page cache, and pages shared with others
LOCKS = (6, 7, 37, 38)  # F_SETLK, F_SETLKW and those of open file descriptions; F_GETLK would reveal who holds one
DESCRIPTORS = (0, 1, 2, 3, 4, 8, 9, 10, 11, 15, 16, 1030, 1032)  # F_DUPFD to F_GETOWN_EX, F_DUPFD_CLOEXEC, F_GETPIPE_SZ
BUFFERS = (7, 8, 32, 33)  # SO_SNDBUF, SO_RCVBUF and their FORCE: a socket keeps the system's default
SET_OPTIONS = (2, 9, 13, 15, 20, 21, 66, 67)  # SO_REUSEADDR, _KEEPALIVE, _LINGER, _REUSEPORT, time-outs
GET_OPTIONS = (*SET_OPTIONS, 3, 4, 7, 8, 17, 30, 38, 39)  # and _TYPE, _ERROR, sizes, _PEERCRED, _PROTOCOL, _DOMAIN
NOWAIT = 8
AUTOBIND = 2  # an address of two bytes, the family alone: the kernel takes the next of a counter that everybody shares
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
NOTHING = ERRNO | 0
NUMBER, ARCHITECTURE = 0, 4
ARGUMENTS = (16, 24, 32, 40, 48, 56)  # offsets in struct seccomp_data (little-endian low words)
HIGH = 4  # from a low word to its high one


def refuse(code):
    return ERRNO | code


def load(offset):
    return [struct.pack("HBBI", 0x20, 0, 0, offset)]


def jump(code, value, true, false):
    return [struct.pack("HBBI", code, true, false, value)]


def equal(value, true, false):
    return jump(0x15, value, true, false)


def any_bit(mask, true, false):
    return jump(0x45, mask, true, false)


def give(action):
    return [struct.pack("HBBI", 0x06, 0, 0, action)]


def by_argument(argument, actions, otherwise):
    """The action for this argument's value, else `otherwise`."""
    out = load(ARGUMENTS[argument])
    for value, action in actions.items():
        out += equal(value, 0, 1) + give(action)
    return out + give(otherwise)


def program(fork, unix=True):
    """The filter's bytes.

    Without `fork`: threads, but no processes and no exec. Without `unix`: no sockets but pairs.
    """
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise OSError("no system-call filter for %s" % machine)
    audit, column = ARCHITECTURES[machine]
    out = load(ARCHITECTURE) + equal(audit, 1, 0) + give(KILL) + load(NUMBER)
    if machine == "x86_64":  # the x32 personality shares the architecture
        out += jump(0x35, 0x40000000, 0, 1) + give(KILL)
    out += jump(0x25, LAST_KNOWN, 0, 1) + give(refuse(errno.ENOSYS))
    return b"".join(out + search(sorted(rules(fork, unix, column).items())))


def search(found):
    """Find the rule of a call by halving: the kernel walks the filter once for each call that there is whenever a
    program starts."""
    if len(found) <= 4:
        out = []
        for number, rule in found:
            out += equal(number, 0, len(rule)) + rule
        return out + give(ALLOW)
    middle = len(found) // 2
    low, high = search(found[:middle]), search(found[middle:])
    return jump(0x35, found[middle][0], 0, 1) + jump(0x05, len(low), 0, 0) + low + high


def rules(fork, unix, column):
    """What is done about each call that is not simply allowed, by its number: instructions that end in an action.

    The first that is set counts.
    """
    out = {}

    def rule(call, instructions):
        if call[column] is not None:
            out.setdefault(call[column], instructions)

    for call in DENIED.values():
        rule(call, give(refuse(errno.EPERM)))
    for call in NOTHING_DONE.values():
        rule(call, give(NOTHING))
    rule(CLONE3, give(refuse(errno.ENOSYS)))
    if not fork:
        for call in FORK.values():
            rule(call, give(refuse(errno.EAGAIN)))
        for call in EXEC.values():
            rule(call, give(refuse(errno.EPERM)))
    # clone: never into new namespaces; without fork, threads only
    threads = [] if fork else any_bit(THREAD, 1, 0) + give(refuse(errno.EAGAIN))
    rule(CLONE, load(ARGUMENTS[0]) + any_bit(NEW_NAMESPACES, 0, 1) + give(refuse(errno.EPERM)) + threads + give(ALLOW))
    if fork:  # children that nobody waits for would take the account of their processor time with them: SIGCHLD is only asked about
        child = load(ARGUMENTS[0]) + equal(signal.SIGCHLD, 1, 0) + give(ALLOW)
        child += load(ARGUMENTS[1]) + equal(0, 0, 2) + load(ARGUMENTS[1] + HIGH) + equal(0, 1, 0)
        rule(SIGACTION, child + give(refuse(errno.EPERM)) + give(ALLOW))
    if not unix:  # where the network namespace is the host's, a unix socket could reach the host's services
        rule(SOCKET, give(refuse(errno.EACCES)))
    for call in (SOCKET, SOCKETPAIR):  # unix sockets of the jail's own network namespace only
        rule(call, by_argument(0, {AF_UNIX: ALLOW}, refuse(errno.EACCES)))
    rule(BIND, by_argument(2, {AUTOBIND: refuse(errno.EINVAL)}, ALLOW))
    known = dict.fromkeys(SET_OPTIONS, ALLOW) | dict.fromkeys(BUFFERS, NOTHING)
    rule(SETSOCKOPT, by_argument(2, known, refuse(errno.ENOPROTOOPT)))
    rule(GETSOCKOPT, by_argument(2, dict.fromkeys(GET_OPTIONS, ALLOW), refuse(errno.ENOPROTOOPT)))
    rule(PRLIMIT, by_argument(0, {0: ALLOW}, refuse(errno.EPERM)))  # its own limits only
    own = dict.fromkeys((SET_DEATH_SIGNAL, SET_SECCOMP, SET_MEMORY_MERGE), refuse(errno.EPERM))
    rule(PRCTL, by_argument(0, own, ALLOW))  # it ends with its keeper
    rule(IOCTL, by_argument(1, dict.fromkeys((TIOCSTI, TIOCLINUX), refuse(errno.EPERM)), ALLOW))
    commands = dict.fromkeys(DESCRIPTORS, ALLOW) | dict.fromkeys(LOCKS, NOTHING)
    rule(FCNTL, by_argument(1, commands, refuse(errno.EINVAL)))
    rule(MADVISE, by_argument(2, dict.fromkeys(ADVICE, NOTHING), ALLOW))
    for call in (PREADV2, PWRITEV2):  # "only if it need not wait" is always answered with "it would have to"
        rule(call, by_argument(5, {0: ALLOW, NOWAIT: refuse(errno.EAGAIN)}, refuse(errno.EOPNOTSUPP)))
    return out
