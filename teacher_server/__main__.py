"""``python -m teacher_server --config F --listen ADDR`` (``opd serve teacher``)."""

from opd_mesh.config.services import TeacherServerConfig
from opd_mesh.process import parse_arguments, run


def main() -> None:
    """Parse the command line, then import torch and serve."""
    arguments = parse_arguments("teacher", TeacherServerConfig)
    from teacher_server.server import serve

    run(serve(arguments))


if __name__ == "__main__":
    main()
