"""Own the door: boot a stock Linux kernel under QEMU and run one Python program in it, its stdin and stdout being pipes here.

    with Guest(Path("program.py"), nodes=2) as guest:
        guest.stdin.write(b"question\\n")
        answer = guest.stdout.readline()
    assert guest.exit_code == 0 and not guest.complaints()

The program finds the standard library, modules beside it, and the packages that `Guest` is given; it is process 1's child, root, and alone
in its kernel. What the kernel says goes to `log()`, never between the answers. Imports go one way: guest, then initramfs, machine and
kernels, then vmlinux, cpio and packages, then cache, complaints and errors. init.py is run in the guest and imported by nobody.
"""

from kernelguest.errors import GuestDied, GuestError, GuestHung
from kernelguest.guest import Guest
from kernelguest.kernels import fetch, find, why_not

__all__ = ["Guest", "GuestDied", "GuestError", "GuestHung", "fetch", "find", "why_not"]
