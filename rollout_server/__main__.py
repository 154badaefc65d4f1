"""``python -m rollout_server --config F --listen ADDR`` (``opd serve rollout``)."""

from opd_mesh.config.services import RolloutServerConfig
from opd_mesh.process import parse_arguments, run


def main() -> None:
    """Parse the command line, then import torch and serve."""
    arguments = parse_arguments("rollout", RolloutServerConfig)
    from rollout_server.server import serve

    run(serve(arguments))


if __name__ == "__main__":
    main()
