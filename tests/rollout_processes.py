"""Rollout servers in processes of their own that start in a fraction of a second, to be killed in numbers.

Importing torch and transformers takes seconds. One process does that once and forks a child for every server; it has
opened no channel and started no thread by then, so that its children are as good as processes from the shell.

Run as a script it is that process: a line of JSON on stdin starts a server, a line with its pid comes back.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT / part) for part in (".", "protos", "kernels", "tests")]
START_S = 60.0


class Nursery:
    """The process that forks servers. Closing it kills them all."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._pids: set[int] = set()

    def start(self, config: dict[str, Any], folder: Path, listen: str = "127.0.0.1:0") -> Server:
        """Start a server; does not wait for it."""
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.yaml")))
        (folder / f"{number}.yaml").write_text(json.dumps(config))  # JSON is YAML
        order = {"folder": str(folder), "number": number, "listen": listen}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        self._pids.add(pid)
        return Server(self, pid, folder, number)

    def forget(self, pid: int) -> None:
        """It is dead and will not be killed again."""
        self._pids.discard(pid)

    def close(self) -> None:
        """Kill everything."""
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.communicate()


class Server:
    """One server process."""

    def __init__(self, nursery: Nursery, pid: int, folder: Path, number: int) -> None:
        self.pid = pid
        self.log = folder / f"{number}.log"
        self._nursery = nursery
        self._ready = folder / f"{number}.ready"

    def is_ready(self) -> bool:
        """It listens, and has its model and its log."""
        return self._ready.exists()

    def address(self) -> str:
        """Once it is ready."""
        deadline = time.monotonic() + START_S
        while not self.is_ready():
            assert self.alive(), self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)
        return str(json.loads(self._ready.read_text())["address"])

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def alive(self) -> bool:
        """Whether it runs."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return stat.rpartition(")")[2].split()[0] not in ("Z", "X")

    def wait(self, timeout_s: float = START_S) -> None:
        """Until it has ended."""
        deadline = time.monotonic() + timeout_s
        while self.alive():
            assert time.monotonic() < deadline, f"{self.pid} does not end:\n{self.log.read_text()}"
            time.sleep(0.005)
        self._nursery.forget(self.pid)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.signal(signal.SIGKILL)
        self.wait()


def _serve(order: dict[str, Any]) -> None:
    from opd_mesh.config.services import RolloutServerConfig
    from opd_mesh.process import parse_arguments, run
    from rollout_server.server import serve

    folder, number = Path(order["folder"]), order["number"]
    log = os.open(folder / f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["rollout_server", "--config", str(folder / f"{number}.yaml"), "--listen", order["listen"]]
    sys.argv += ["--ready-file", str(folder / f"{number}.ready")]
    run(serve(parse_arguments("rollout", RolloutServerConfig)))


def _main() -> None:
    import transformers.models.llama.modeling_llama

    import rollout_server.server

    assert transformers
    assert rollout_server
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are not kept
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _serve(json.loads(line))
            except SystemExit as end:
                os._exit(int(end.code or 0))
            except BaseException:  # noqa: BLE001 - a child must not go on with the loop below
                import traceback

                traceback.print_exc()
                os._exit(70)
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    _main()
