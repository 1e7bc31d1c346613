"""System calls that fail, for this process alone: Linux lets a process filter its own (seccomp), without a compiler."""

import ctypes
import errno
import os
import struct

import pytest

_NUMBERS = {
    'x86_64': {'fsync': [74], 'rename': [82, 264, 316], 'link': [86, 265]},
    'aarch64': {'fsync': [82], 'rename': [38, 276], 'link': [37]},
}
_MACHINE = os.uname().machine
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 22, 38, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = [('length', ctypes.c_ushort), ('filter', ctypes.c_void_p)]


def fail(name: str, error: int = errno.ENOSPC) -> None:
    """From now on, let every system call of that name fail in this process and its children."""
    steps = [(_LOAD, 0, 0, 0)]  # the number of the call
    for number in _NUMBERS[_MACHINE][name]:
        steps += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | error)]
    steps.append((_RETURN, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *step) for step in steps))
    program = _Program(len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), 'this machine lets no process filter its system calls')


def available() -> bool:
    """Whether this machine has such filters."""
    if not os.path.exists('/proc/self/status') or _MACHINE not in _NUMBERS:
        return False
    with open('/proc/self/status') as status:
        return any(line.startswith('Seccomp:') for line in status)


needed = pytest.mark.skipif(not available(), reason='failing system calls take seccomp: Linux on x86_64 or aarch64')
