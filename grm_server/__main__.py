"""``python -m grm_server --config F --listen ADDR`` (``opd serve grm``)."""

from opd_mesh.config.services import GrmServerConfig
from opd_mesh.process import parse_arguments, run


def main() -> None:
    """Parse the command line, then import the tokenizer's library and serve."""
    arguments = parse_arguments("grm", GrmServerConfig)
    from grm_server.server import serve

    run(serve(arguments))


if __name__ == "__main__":
    main()
