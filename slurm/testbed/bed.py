"""A real Slurm with three nodes on one Debian machine, started and stopped by root.

Everything is in one folder: the daemons' settings, state, logs and sockets, and the accounting database. Node names
resolve only in the daemons' own view of `/etc/hosts` (a mount namespace), ports are free ones of the loopback device,
and no file, user or service of the host is touched: all that the daemons started ends with them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from lbr_dist.errors import LaunchError
from lbr_dist.slurm.testbed.settings import (
    GPUS,
    NODES,
    Ports,
    database_init,
    gres_conf,
    slurm_conf,
    slurmdbd_conf,
)

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurmdbd", "munge", "mariadb-server")
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "mariadb-install-db", "sbatch", "unshare")
START_SECONDS = 30.0
STOP_SECONDS = 10.0

_SEARCH = ":".join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def why_not() -> str | None:
    """Why no test bed can start on this machine, and what to do; None if one can."""
    if os.geteuid() != 0:
        return "it needs root: its daemons start jobs as their users. Run as root, in a container for example"
    missing = [name for name in PROGRAMS if shutil.which(name, path=_SEARCH) is None]
    if missing:
        return f"{', '.join(missing)} not found; apt-get install {' '.join(PACKAGES)}"
    return None


class Bed:
    """The cluster in a folder, running or not."""

    def __init__(self, folder: Path, accounting: bool = True, niceness: int = 0) -> None:
        """Args:
        folder: an absolute path of up to 60 characters (socket names are short), without spaces.
        accounting: start slurmdbd and its database too.
        niceness: of all jobs, for a machine with other work.
        """
        self.folder = folder
        self.accounting = accounting
        self.niceness = niceness

    @property
    def environment(self) -> dict[str, str]:
        """The environment for talking to this cluster, not to a Slurm of the host."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
        return kept | {"SLURM_CONF": str(self._etc / "slurm.conf"), "PATH": _SEARCH}

    def run(self, *command: str, seconds: float = 20.0, check: bool = True) -> str:
        """The output of a client command.

        Raises:
            LaunchError: it fails, or doesn't end in time.
        """
        try:
            done = subprocess.run(
                command, env=self.environment, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise LaunchError(f"{' '.join(command)}: no answer within {seconds:g} s") from None
        if check and done.returncode:
            raise LaunchError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    # ---- up ---------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Start the cluster; returns when all nodes are up.

        Raises:
            LaunchError: it cannot start, or is not up within half a minute; what was started is stopped again.
        """
        reason = why_not()
        if reason:
            raise LaunchError(f"the Slurm test bed cannot start: {reason}.")
        if not self.folder.is_absolute() or len(str(self.folder)) > 60 or " " in str(self.folder):
            raise LaunchError(f"{self.folder}: expected an absolute path of up to 60 characters, without spaces.")
        if self._pids():
            raise LaunchError(f"{self.folder}: a test bed is already up there. Take it down first.")
        try:
            self._write()
            self._start_munge()
            if self.accounting:
                self._start_accounting()
            self.start_controller()
            for name in NODES:
                self.start_node(name)
            self.wait_up()
        except BaseException:
            self.down()
            raise

    def wait_up(self) -> None:
        """Wait until all nodes can take jobs, or have some."""
        up = ("idle", "mixed", "allocated")
        self._wait(
            "all nodes to be up", lambda: [state in up for state in self.states().values()] == [True] * len(NODES)
        )

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        for name in ("etc", "log", "run", "state", "db", "gpu", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        controller, accounting, database, *nodes = _free_ports(3 + len(NODES))
        ports = Ports(controller, accounting, database, tuple(nodes))
        host = socket.gethostname().split(".")[0]
        (self._etc / "slurm.conf").write_text(slurm_conf(self.folder, host, ports, self.accounting))
        (self._etc / "gres.conf").write_text(gres_conf(self.folder))
        (self._etc / "ports.json").write_text(json.dumps({"database": ports.database, "accounting": ports.accounting}))
        for name, content in (
            ("slurmdbd.conf", slurmdbd_conf(self.folder, ports)),
            ("database.sql", database_init()),
            ("munge.key", secrets.token_hex(512)),
        ):
            with open(self._etc / name, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(content)
        for number in range(GPUS):
            (self.folder / "gpu" / str(number)).touch()
        names = "".join(f"127.0.0.{2 + i} {name}\n" for i, name in enumerate(NODES))
        (self._etc / "hosts").write_text(Path("/etc/hosts").read_text() + names)

    def _start_munge(self) -> None:
        run = self.folder / "run"
        self._start(
            "munged",
            f"--key-file={self._etc / 'munge.key'}",
            f"--socket={run / 'munge.socket'}",
            f"--pid-file={run / 'munged.pid'}",
            f"--log-file={self.folder / 'log' / 'munged.log'}",
            f"--seed-file={run / 'munge.seed'}",
            "--foreground",
            "--force",
        )
        self._wait("munge to answer", (run / "munge.socket").exists)

    def _start_accounting(self) -> None:
        database, ports = self.folder / "db", json.loads((self._etc / "ports.json").read_text())
        if not (database / "mysql").exists():
            self._once("mariadb-install-db", "--no-defaults", f"--datadir={database}", "--user=root", "--skip-test-db")
        self._start(
            "mariadbd",
            "--no-defaults",
            f"--datadir={database}",
            f"--socket={self.folder}/run/db.socket",
            "--user=root",
            "--bind-address=127.0.0.1",
            f"--port={ports['database']}",
            f"--pid-file={self.folder}/run/mariadbd.pid",
            f"--init-file={self._etc / 'database.sql'}",
            "--innodb-buffer-pool-size=64M",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-lock-wait-timeout=900",
            "--skip-innodb-doublewrite",
        )
        self._wait("the database to answer", lambda: _listens(ports["database"]))
        self._start("slurmdbd", "-D", environment={"SLURM_CONF": str(self._etc / "slurm.conf")})
        self._wait("slurmdbd to answer", lambda: _listens(ports["accounting"]))

    def start_controller(self) -> None:
        """Start slurmctld, for the first time or again."""
        self._start("slurmctld", "-D", "-f", str(self._etc / "slurm.conf"))

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node; jobs on it can resolve the nodes' names."""
        bind = 'mount --bind "$1" /etc/hosts && shift && exec "$@"'
        self._start(
            "slurmd",
            "-D",
            "-f",
            str(self._etc / "slurm.conf"),
            "-N",
            name,
            name=f"slurmd-{name}",
            before=(
                *("nice", "-n", str(self.niceness)),
                *("unshare", "--mount", "--propagation", "slave", "sh", "-c", bind, "sh", str(self._etc / "hosts")),
            ),
        )

    # ---- faults, and down -------------------------------------------------------------------------------------

    def stop_controller(self) -> None:
        """Stop slurmctld; it saves its state."""
        _end([self._pid("slurmctld")])

    def read_only(self, name: str, folder: Path) -> Callable[[], None]:
        """Make a folder read-only on one node only, as a broken mount does. Returns a function that undoes it."""
        inside = ("nsenter", f"--mount=/proc/{self._pid(f'slurmd-{name}')}/ns/mnt")
        self.run(*inside, "mount", "--bind", str(folder), str(folder))
        self.run(*inside, "mount", "-o", "remount,bind,ro", str(folder))

        def undo() -> None:
            self.run(*inside, "umount", "--lazy", str(folder))

        return undo

    def crash_node(self, name: str) -> None:
        """Kill a node's daemon and all that it runs, at once, as a power failure does."""
        _kill(_tree(self._pid(f"slurmd-{name}")) + self._steps(name))

    def _steps(self, name: str) -> list[int]:
        """The slurmstepd processes of a node and their descendants: they outlive their slurmd."""
        found = []
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if process.name.isdigit() and (process / "comm").read_text().startswith("slurmstepd"):
                    opened = [os.readlink(file) for file in (process / "fd").iterdir()]
                    if any(f"{self.folder}/" in path and name in Path(path).name for path in opened):
                        found += _tree(int(process.name))
        return found

    def down(self) -> None:
        """Stop everything, jobs first; the folder stays, with the logs."""
        pids = self._pids()
        if "slurmctld" in pids and pids.keys() & {f"slurmd-{name}" for name in NODES}:
            with contextlib.suppress(LaunchError):
                self.run("scancel", "--user=root", "--signal=KILL", "--full", seconds=5, check=False)
        nodes = [pids[name] for name in pids if name.startswith("slurmd-")]
        steps = [pid for name in NODES for pid in self._steps(name)]
        _kill(steps + [pid for node in nodes for pid in _tree(node)[1:]])
        for names in (("slurmd-",), ("slurmctld",), ("slurmdbd",), ("mariadbd",), ("munged",)):
            _end([pid for name, pid in pids.items() if name.startswith(names)])
        for file in (self.folder / "run").glob("*.process"):
            file.unlink()

    # ---- processes --------------------------------------------------------------------------------------------

    @property
    def _etc(self) -> Path:
        return self.folder / "etc"

    def _once(self, program: str, *arguments: str) -> None:
        with (self.folder / "log" / f"{program}.log").open("ab") as log:
            command = [str(shutil.which(program, path=_SEARCH)), *arguments]
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False, timeout=120)
        if done.returncode:
            raise LaunchError(f"{program} exited with code {done.returncode}; see {self.folder}/log/{program}.log")

    def _start(
        self,
        program: str,
        *arguments: str,
        name: str | None = None,
        before: Iterable[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        """Start a daemon in its own session; it keeps running when this process exits."""
        name = name or program
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                [*before, str(shutil.which(program, path=_SEARCH)), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment | (environment or {}),
                start_new_session=True,
                cwd="/",
            )
        began = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
        (self.folder / "run" / f"{name}.process").write_text(f"{process.pid} {began}")

    def _pid(self, name: str) -> int:
        pid = self._pids().get(name)
        if pid is None:
            raise LaunchError(f"{self.folder}: {name} is not up")
        return pid

    def _pids(self) -> dict[str, int]:
        """The pids of the running daemons. An unrelated process that reuses a pid does not count."""
        found: dict[str, int] = {}
        for file in (self.folder / "run").glob("*.process"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                pid, began = file.read_text().split()
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                if fields[19] == began and fields[0] != "Z":
                    found[file.stem] = int(pid)
        return found

    def states(self) -> dict[str, str]:
        """The nodes' states: idle, mixed, allocated, down*, …; empty while the controller does not answer."""
        try:
            rows = self.run("sinfo", "-h", "-N", "-p", "normal", "-o", "%N %T", seconds=5).split()
        except LaunchError:  # the controller does not listen yet
            return {}
        return dict(zip(rows[::2], rows[1::2], strict=True))

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"test bed: waited {START_SECONDS:g} s for {what}, in vain. Logs are in {self.folder}/log"
                )
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    """Free ports of the loopback device, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _listens(port: int) -> bool:
    with socket.socket() as found:
        found.settimeout(1)
        return found.connect_ex(("127.0.0.1", port)) == 0


def _tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(process.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _end(pids: list[int]) -> None:
    """Ask processes to exit, and kill those that don't."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while any(_lives(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    _kill(pids)


def _lives(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
