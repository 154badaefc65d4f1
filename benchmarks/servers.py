"""Teacher servers for benchmarks: real processes, and what they take of the machine's memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 600.0


def say(text: str) -> None:
    """Progress, beside the JSON on stdout."""
    print(text, file=sys.stderr, flush=True)


class TeacherProcess:
    """``python -m teacher_server`` with a configuration, from its start to SIGTERM."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        self.name = name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
        self._ready = folder / f"{name}.ready.json"
        self._ready.unlink(missing_ok=True)
        self.log = folder / f"{name}.log"
        command = [sys.executable, "-m", "teacher_server", "--config", str(folder / f"{name}.yaml")]
        command += ["--ready-file", str(self._ready), "--die-with-parent", str(os.getpid())]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def address(self) -> str:
        """Wait until it serves."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._ready.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                sys.exit(
                    f"the {self.name} server did not come up; {self.log} ends with:\n{self.log.read_text()[-2000:]}"
                )
            time.sleep(0.05)
        return str(json.loads(self._ready.read_text())["address"])

    def memory(self) -> dict[str, int]:
        """Bytes: ``rss`` (anonymous pages and mapped files), ``peak`` of it since :meth:`reset_peak`, ``mapped``."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        names = {"rss": "VmRSS", "peak": "VmHWM", "mapped": "RssFile"}
        return {name: int(fields[key].split()[0]) * 1024 for name, key in names.items()}

    def reset_peak(self) -> None:
        """``peak`` begins anew at the present ``rss``."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def stop(self) -> None:
        """SIGTERM, and wait."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)
