"""The system-call filter of a jailed program, assembled by hand for x86-64 and aarch64 (seccomp(2), classic BPF)."""

import errno
import platform
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
    "semget": (64, 190), "semop": (65, 193), "semtimedop": (220, 192), "msgget": (68, 186), "mq_open": (240, 180),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "acct": (163, 89), "sethostname": (170, 161), "setdomainname": (171, 162), "syslog": (103, 116), "vmsplice": (278, 75),
    "ioperm": (173, None), "iopl": (172, None), "modify_ldt": (154, None), "vhangup": (153, 58), "fanotify_init": (300, 262),
    "lookup_dcookie": (212, 18), "nfsservctl": (180, 42), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    # marks on files that outlive a program, also on what is read-only or not its own folder's
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None),
    "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "flock": (73, 32),
    # how other processes run
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
}  # fmt: skip
FORK = {"fork": (57, None), "vfork": (58, None)}
EXEC = {"execve": (59, 221), "execveat": (322, 281)}
CLONE, CLONE3, SOCKET, SOCKETPAIR, IOCTL = (56, 220), (435, 435), (41, 198), (53, 199), (16, 29)
PRLIMIT, PRCTL, SET_DEATH_SIGNAL = (302, 261), (157, 167), 1
NEW_NAMESPACES, THREAD = 0x7E020000 | 0x80, 0x10000
AF_UNIX, TIOCSTI, TIOCLINUX = 1, 0x5412, 0x541C
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER, ARCHITECTURE, ARGUMENT_0, ARGUMENT_1 = 0, 4, 16, 24  # offsets in struct seccomp_data (little-endian low words)


def program(fork, unix=True):
    """The filter's bytes. Without `fork`: threads, but no processes and no exec. Without `unix`: no sockets but pairs."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise OSError("no system-call filter for %s" % machine)
    audit, column = ARCHITECTURES[machine]
    out = []

    def load(offset):
        out.append(struct.pack("HBBI", 0x20, 0, 0, offset))

    def jump(code, value, true, false):
        out.append(struct.pack("HBBI", code, true, false, value))

    def give(value):
        out.append(struct.pack("HBBI", 0x06, 0, 0, value))

    def equal(value, true, false):
        jump(0x15, value, true, false)

    load(ARCHITECTURE)
    equal(audit, 1, 0)
    give(KILL)
    load(NUMBER)
    if machine == "x86_64":  # the x32 personality shares the architecture
        jump(0x35, 0x40000000, 0, 1)
        give(KILL)
    jump(0x25, LAST_KNOWN, 0, 1)
    give(ERRNO | errno.ENOSYS)
    refused = [(numbers, errno.EPERM) for numbers in DENIED.values()] + [(CLONE3, errno.ENOSYS)]
    if not fork:
        refused += [(numbers, errno.EAGAIN) for numbers in FORK.values()]
        refused += [(numbers, errno.EPERM) for numbers in EXEC.values()]
    for numbers, code in refused:
        if numbers[column] is not None:
            equal(numbers[column], 0, 1)
            give(ERRNO | code)
    # clone: never into new namespaces; without fork, threads only
    equal(CLONE[column], 0, 4 if fork else 6)
    load(ARGUMENT_0)
    jump(0x45, NEW_NAMESPACES, 0, 1)
    give(ERRNO | errno.EPERM)
    if not fork:
        jump(0x45, THREAD, 1, 0)
        give(ERRNO | errno.EAGAIN)
    load(NUMBER)
    if not unix:  # where the network namespace is the host's, a unix socket could reach the host's services
        equal(SOCKET[column], 0, 1)
        give(ERRNO | errno.EACCES)
    for call in (SOCKET, SOCKETPAIR):  # unix sockets of the jail's own network namespace only
        equal(call[column], 0, 4)
        load(ARGUMENT_0)
        equal(AF_UNIX, 1, 0)
        give(ERRNO | errno.EACCES)
        load(NUMBER)
    equal(PRLIMIT[column], 0, 4)  # its own limits only
    load(ARGUMENT_0)
    equal(0, 1, 0)
    give(ERRNO | errno.EPERM)
    load(NUMBER)
    equal(PRCTL[column], 0, 4)  # it ends with its keeper
    load(ARGUMENT_0)
    equal(SET_DEATH_SIGNAL, 0, 1)
    give(ERRNO | errno.EPERM)
    load(NUMBER)
    equal(IOCTL[column], 0, 5)
    load(ARGUMENT_1)
    equal(TIOCSTI, 1, 0)
    equal(TIOCLINUX, 0, 1)
    give(ERRNO | errno.EPERM)
    load(NUMBER)
    give(ALLOW)
    return b"".join(out)
