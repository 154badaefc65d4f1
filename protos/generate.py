"""Generate and check the protobuf modules of ``opd.v1`` and ``opd.inference`` (``make protos``, ``make protos-check``).

``generate`` rewrites the committed modules; ``check`` fails where they have drifted, where ``buf lint`` objects, and
where a change breaks clients of the committed baseline (``opd_v1_baseline.binpb``, a descriptor set with its source
comments, written by ``accept``).
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.resources
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PROTOS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("opd/*/*.proto"))
BASELINE = ROOT / "opd_v1_baseline.binpb"


def _protoc(*outputs: str) -> None:
    from grpc_tools import protoc

    well_known = importlib.resources.files("grpc_tools") / "_proto"
    import google.rpc.status_pb2 as status

    googleapis = Path(str(status.__file__)).parents[2]
    arguments = ["protoc", f"-I{ROOT}", f"-I{well_known}", f"-I{googleapis}", *outputs, *PROTOS]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed; the message above names the file and line")


def _generate_into(out: Path) -> None:
    _protoc(f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}")


def _image(path: Path) -> Path:
    _protoc("--include_imports", "--include_source_info", f"--descriptor_set_out={path}")
    return path


def _buf(*arguments: str) -> int:
    buf = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
    if buf is None:
        sys.exit("buf is missing: pip install -e '.[dev]' (package buf-bin)")
    return subprocess.run([buf, *arguments], cwd=ROOT, check=False).returncode


def check() -> int:
    """Exit code 1 on drift, lint or breaking change."""
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        _generate_into(out)
        for fresh in sorted(out.rglob("*_pb2*")):
            committed = ROOT / fresh.relative_to(out)
            if not committed.exists() or not filecmp.cmp(fresh, committed, shallow=False):
                print(f"drift: {committed.relative_to(ROOT)} is not what its .proto gives; run `make protos`")
                failed = True
        image = _image(out / "image.binpb")
        config = str(ROOT / "buf.yaml")
        paths = [part for proto in PROTOS for part in ("--path", proto)]
        failed |= _buf("lint", str(image), "--config", config, *paths) != 0
        failed |= _buf("breaking", str(image), "--against", str(BASELINE), "--config", config, *paths) != 0
    print("protos: " + ("FAILED" if failed else "generated code, lint and compatibility are fine"))
    return int(failed)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=["generate", "check", "accept"])
    verb = parser.parse_args().verb
    if verb == "generate":
        _generate_into(ROOT)
    elif verb == "accept":
        _image(BASELINE)
    else:
        sys.exit(check())


if __name__ == "__main__":
    main()
