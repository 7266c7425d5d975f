"""The command line that starts a worker with bubblewrap, and whether this machine can run one."""

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

# To fork into new namespaces and mount there (SYS_ADMIN), give up what is not in this list for good (SETPCAP), take another user's
# identity, and end that user's processes.
AS_ROOT = ("CAP_SYS_ADMIN", "CAP_SETPCAP", "CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_SYS_RESOURCE")
AS_USER = ("CAP_SYS_ADMIN", "CAP_SETPCAP")  # in a user namespace, and of use there only
DEVICES = ("null", "zero", "full", "random", "urandom")
INSIDE = "/tandem/tandem/engine/reward"  # the zygote's files, importable by the names that they have here
ZYGOTE_FILES = ("zygote.py", "channel.py", "watch.py", "in_process.py")
START_ZYGOTE = "import sys; sys.path.insert(0, '/tandem'); from tandem.engine.reward.zygote import main; del sys.path[0]; main()"
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/box",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the same program and input give the same output
    "PYTHONDONTWRITEBYTECODE": "1",
}
INSTALL = "install bubblewrap (Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap)"


class UnavailableError(RuntimeError):
    """This machine cannot run the sandbox; says why, and what to change."""


def interpreter() -> Path:
    """This Python itself, not the virtual environment's link to it."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def interpreter_folders(python: Path) -> list[Path]:
    """What a Python outside /usr needs: its prefix. One inside needs nothing more."""
    if python.is_relative_to("/usr"):
        return []
    return [Path(sysconfig.get_config_var("prefix") or sys.base_prefix) if python == interpreter() else python.parents[1]]


def command(
    *, python: Path, zygote_arguments: Sequence[str], info_fd: int | None, is_root: bool, read_only: Sequence[Path] = ()
) -> list[str]:
    """The whole command line.

    Args:
        is_root: Without a user namespace: the program gets another user's id. Otherwise all is done in a user namespace, and the
            program is the same user, without capabilities.
        info_fd: Where bubblewrap writes the zygote's process id.
        read_only: Folders besides the system's that the languages need.
    Raises: UnavailableError without bubblewrap.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise UnavailableError(f"bwrap is not on the PATH; {INSTALL}")
    words = [bwrap, *("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--as-pid-1")]
    if not is_root:
        words += ["--unshare-user", "--uid", "1000", "--gid", "1000"]
    words += ["--cap-drop", "ALL"]
    for capability in AS_ROOT if is_root else AS_USER:
        words += ["--cap-add", capability]
    words += ["--new-session", "--hostname", "sandbox", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        words += ["--setenv", name, value]
    words += _parents(["/dev/null", f"{INSIDE}/zygote.py", "/etc/alternatives", *map(str, read_only)])
    words += _system(read_only)
    for name in ZYGOTE_FILES:
        words += ["--ro-bind", str(Path(__file__).with_name(name)), f"{INSIDE}/{name}"]
    words += ["--proc", "/proc"]
    for device in DEVICES:
        words += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for link, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        words += ["--symlink", f"/proc/self/{target}", f"/dev/{link}"]
    for folder in ("/box", "/tmp", "/dev/shm", "/mnt"):
        words += ["--dir", folder]
    words += ["--remount-ro", "/", "--chdir", "/"]
    if info_fd is not None:
        words += ["--info-fd", str(info_fd)]
    return [*words, "--", str(python), "-s", "-S", "-P", "-B", "-c", START_ZYGOTE, *zygote_arguments]


def _parents(paths: Sequence[str]) -> list[str]:
    """The folders above these, open to all: bubblewrap by itself would make them for their owner only."""
    folders = {str(folder) for path in paths for folder in Path(path).parents if str(folder) != "/" and not folder.is_relative_to("/usr")}
    return [word for folder in sorted(folders) for word in ("--perms", "0755", "--dir", folder)]


def _system(read_only: Sequence[Path]) -> list[str]:
    """/usr, its links at the top, and of /etc only what loaders and compilers read."""
    words = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        top = Path("/", name)
        if top.is_symlink():
            words += ["--symlink", str(top.readlink()), str(top)]
        elif top.is_dir():
            words += ["--ro-bind", str(top), str(top)]
    for path in ("/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d"):
        words += ["--ro-bind-try", path, path]
    for path in sorted(Path("/etc").glob("java-*")):
        words += ["--ro-bind", str(path), str(path)]
    for path in read_only:
        words += ["--ro-bind", str(path), str(path)]
    return words


def check_available(*, is_root: bool) -> None:
    """Start /bin/true once, in all the namespaces of a worker.

    Raises: UnavailableError with bubblewrap's own words, if it cannot.
    """
    words = command(python=Path("/bin/true"), zygote_arguments=(), info_fd=None, is_root=is_root)
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise UnavailableError(
            f"bubblewrap cannot make namespaces here: {done.stderr.strip()}; run as root, or allow unprivileged user namespaces (sysctl"
            " user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns); a container needs the capability SYS_ADMIN"
        )
