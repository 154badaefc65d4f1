"""``python -m student_trainer --config RECIPE --run-dir DIR --listen ADDR`` (``opd serve trainer``)."""

from pathlib import Path
from typing import Any

from opd_mesh.config.recipe import Recipe
from opd_mesh.process import parse_arguments, run

EXTRA: dict[str, dict[str, Any]] = {
    "--run-dir": {"type": Path, "required": True, "help": "folder of the run: metrics, checkpoints, student, report"},
    "--resume": {"action": "store_true", "help": "continue from the newest checkpoint in --run-dir"},
}


def main() -> None:
    """Parse the command line, then import torch and train."""
    arguments = parse_arguments("trainer", Recipe, extra=EXTRA)
    from student_trainer.server import serve

    run(serve(arguments))


if __name__ == "__main__":
    main()
