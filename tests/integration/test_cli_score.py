"""``opd score`` against a real teacher server process: the numbers of a local forward pass, and what goes wrong."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import logits_of, save_tiny_checkpoint, tiny_model, tiny_tokenizer

from opd_mesh.cli import score as score_module
from opd_mesh.cli.main import main
from opd_mesh.clients.scoring_stream import ScoringStream
from opd_mesh.clients.teacher import ScoreRequest, ScoreResult, TeacherClient
from opd_mesh.errors import OverloadedError, UnavailableError
from opd_mesh.models.tokenizer import tokenizer_fingerprint

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5  # of the logits' standard deviation (about 6)
# trajectory id → (token ids, scored spans); the second has two spans, the third a single row.
ITEMS: dict[str, tuple[list[int], list[list[int]]]] = {
    "plain": ([5, 9, 12, 40, 41, 42, 17], [[3, 7]]),
    "two spans": ([6, 7, 8, 9, 10, 11, 12, 13, 14], [[1, 3], [6, 9]]),
    "one/token": ([100, 90], [[1, 2]]),
}


@dataclass(frozen=True)
class Served:
    """The server, and what it serves."""

    address: str
    checkpoint: Path
    fingerprint: str

    def expected(self, name: str) -> torch.Tensor:
        """[R, V] logits of a local forward pass: row t is what predicts the scored token t."""
        ids, spans = ITEMS[name]
        rows = [position - 1 for start, end in spans for position in range(start, end)]
        return logits_of(tiny_model("llama"), ids)[rows]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    checkpoint = save_tiny_checkpoint(folder / "teacher", "llama")
    config = {
        "teachers": {"math": {"path": str(checkpoint), "max_tokens_per_item": 16}},
        "max_items_in_flight": 2,  # fewer than there are items: the client must keep to the credits
        "server": {"drain_propagation_s": 0.0, "drain_grace_s": 2.0},
    }
    (folder / "teacher.yaml").write_text(yaml.safe_dump(config))
    ready = folder / "ready.json"
    command = [sys.executable, "-m", "teacher_server", "--config", str(folder / "teacher.yaml")]
    command += ["--listen", "127.0.0.1:0", "--ready-file", str(ready), "--die-with-parent", str(os.getpid())]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 90
            while not ready.exists():
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
            address = json.loads(ready.read_text())["address"]
            yield Served(address, checkpoint, tokenizer_fingerprint(tiny_tokenizer().get_vocab()))
        finally:
            os.kill(process.pid, signal.SIGTERM)
            process.wait(20)


def write_lines(path: Path, *lines: Any) -> Path:
    """Values as JSON, text as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def line_of(name: str) -> dict[str, Any]:
    ids, spans = ITEMS[name]
    return {"trajectory_id": name, "token_ids": ids, "scored_spans": spans}


@pytest.fixture
def opd_score(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """``opd score`` as the shell calls it; (exit code, stderr). Options of None are left out, lists repeated."""

    def call(trajectories: Path, out: Path, **options: Any) -> tuple[int, str]:
        given = {"teacher": "math", "address": served.address, "fingerprint": served.fingerprint, **options}
        each = [
            (key, value)
            for key, values in given.items()
            for value in (values if isinstance(values, list) else [values])
            if value is not None
        ]
        words = [word for key, value in each for word in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", ["opd", "score", str(trajectories), "--out", str(out), *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), " ".join(capsys.readouterr().err.split())

    return call


def test_logits_are_those_of_a_local_forward_pass(served: Served, opd_score: Any, tmp_path: Path) -> None:
    # One line as the mesh writes it (more fields, spans as objects), the others in the short form.
    full = line_of("plain") | {"domain": "sums", "scored_spans": [{"start": 3, "end": 7}], "run_id": "r"}
    path = write_lines(tmp_path / "in.jsonl", full, "", line_of("two spans"), line_of("one/token"))
    out = tmp_path / "out.safetensors"
    code, said = opd_score(path, out, signal="logits", fingerprint=None, tokenizer=served.checkpoint)
    assert (code, said) == (0, f"3 marked: {out}")
    tensors = load_file(out)
    assert set(tensors) == set(ITEMS)
    for name, tensor in tensors.items():
        expected = served.expected(name)
        assert tensor.shape == expected.shape
        assert float((tensor - expected).abs().max()) < TOLERANCE * float(expected.std())
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert (metadata["teacher_id"], metadata["signal"], metadata["dtype"]) == ("math", "logits", "float32")
    assert len(metadata["teacher_digest"]) == len(metadata["head_digest"]) == 64
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in.jsonl", "out.safetensors"]


def test_bfloat16_hidden_states_stay_bfloat16(served: Served, opd_score: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", *map(line_of, ITEMS))
    assert opd_score(path, tmp_path / "out.safetensors", dtype="bfloat16")[0] == 0
    weight = tiny_model("llama").get_output_embeddings().weight.detach()
    for name, tensor in load_file(tmp_path / "out.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        expected = served.expected(name)
        assert float((tensor.float() @ weight.T - expected).abs().max()) < 0.02 * float(expected.std())


def test_lines_of_json_resume(served: Served, opd_score: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    path = write_lines(tmp_path / "in.jsonl", line_of("plain"), line_of("two spans"))
    assert opd_score(path, out, signal="logits")[0] == 0
    before = out.read_bytes()
    out.write_bytes(before + b'{"trajectory_id": "one/token", "item_di')  # killed in the middle of a write
    write_lines(path, *map(line_of, ITEMS))
    code, said = opd_score(path, out, signal="logits")
    assert (code, said) == (0, f"1 marked, 2 there already: {out}")
    assert out.read_bytes().startswith(before)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(line["trajectory_id"] for line in lines) == sorted(ITEMS)
    for line in lines:
        expected = served.expected(line["trajectory_id"])
        array = np.frombuffer(base64.b64decode(line["data"]), "<f4").reshape(line["shape"])
        assert np.abs(array - expected.numpy()).max() < TOLERANCE * float(expected.std())
    # The same id with other tokens is not what was marked; the same file for another signal is refused whole.
    code, said = opd_score(write_lines(path, {**line_of("plain"), "token_ids": [5] * 7}), out, signal="logits")
    assert code == 1
    assert "has an answer to other tokens under this id" in said
    assert f"{out} has an answer to other tokens under this id" in said
    for options, reason in (
        ({"signal": "hidden_states"}, "holds answers with signal logits, not hidden_states"),
        ({"signal": "logits", "dtype": "float16"}, "holds answers with dtype float32, not float16"),
        ({"signal": "top_k_logprobs", "top-k": 3}, "holds answers with signal logits, not top_k_logprobs"),
    ):
        code, said = opd_score(path, out, **options)
        assert code == 2
        assert reason in said
    assert out.read_text().splitlines() == [json.dumps(line) for line in lines]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_top_k_logprobs_by_the_teacher_and_by_candidates(
    served: Served, opd_score: Any, tmp_path: Path, dtype: str
) -> None:
    candidates = [[7, 7, 0], [128, 1, 2], [3, 4, 5], [6, 7, 8]]  # of four scored tokens
    path = write_lines(
        tmp_path / "in.jsonl",
        line_of("plain") | {"candidate_token_ids": candidates},
        line_of("two spans"),
        line_of("one/token") | {"candidate_token_ids": None},
    )
    out = tmp_path / "out.safetensors"
    options = {"signal": "top_k_logprobs", "top-k": 3} | ({"dtype": dtype} if dtype != "float32" else {})
    assert opd_score(path, out, **options) == (0, f"3 marked: {out}")
    tensors = load_file(out)
    assert set(tensors) == {f"{name}.{tensor}" for name in ITEMS for tensor in ("token_ids", "logprobs")}
    for name in ITEMS:
        ids, logprobs = tensors[f"{name}.token_ids"], tensors[f"{name}.logprobs"]
        all_logprobs = served.expected(name).log_softmax(-1)
        expected_ids = torch.tensor(candidates) if name == "plain" else all_logprobs.topk(3).indices
        assert ids.dtype == torch.int64
        assert torch.equal(ids, expected_ids)
        assert logprobs.dtype == getattr(torch, dtype)
        error = (logprobs.float() - all_logprobs.gather(1, ids)).abs().max()
        assert float(error) < (1e-4 if dtype == "float32" else 0.02)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert (metadata["signal"], metadata["top_k"], metadata["dtype"]) == ("top_k_logprobs", "3", dtype)


def test_top_k_logprobs_as_lines_resume(served: Served, opd_score: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    path = write_lines(tmp_path / "in.jsonl", line_of("plain"))
    assert opd_score(path, out, signal="top_k_logprobs", **{"top-k": 2})[0] == 0
    asked = line_of("one/token") | {"candidate_token_ids": [[90, 17]]}
    write_lines(path, line_of("plain"), asked)
    assert opd_score(path, out, signal="top_k_logprobs", **{"top-k": 2}) == (0, f"1 marked, 1 there already: {out}")
    lines = {line["trajectory_id"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert {line["top_k"] for line in lines.values()} == {2}
    for name, line in lines.items():
        arrays = {
            key: np.frombuffer(base64.b64decode(told["data"]), told["dtype"]).reshape(told["shape"])
            for key, told in line["tensors"].items()
        }
        expected = served.expected(name).log_softmax(-1).numpy()
        ids = arrays["token_ids"]
        assert ids.dtype == np.int64
        assert ids.tolist() == ([[90, 17]] if name == "one/token" else np.argsort(-expected)[:, :2].tolist())
        assert np.abs(arrays["logprobs"] - np.take_along_axis(expected, ids, 1)).max() < 1e-4
    # Other candidates are another question; so is another k, of the whole file.
    write_lines(path, asked | {"candidate_token_ids": [[90, 18]]})
    code, said = opd_score(path, out, signal="top_k_logprobs", **{"top-k": 2})
    assert code == 1
    assert "has an answer to other tokens or candidates under this id; give another id or --out" in said
    code, said = opd_score(path, out, signal="top_k_logprobs", **{"top-k": 3})
    assert code == 2
    assert "holds answers with top_k 2, not 3: give another --out, or remove the file" in said
    code, said = opd_score(path, out, signal="token_logprobs")
    assert code == 2
    assert "holds answers with signal top_k_logprobs, not token_logprobs" in said


def test_token_logprobs_of_replicas(served: Served, opd_score: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", *map(line_of, ITEMS))
    out = tmp_path / "out.safetensors"
    addresses = [served.address, "127.0.0.1:1"]  # nobody answers at the second
    code, said = opd_score(path, out, signal="token_logprobs", address=addresses)
    assert code == 0, said
    assert f"3 marked: {out}" in said
    tensors = load_file(out)
    assert set(tensors) == set(ITEMS)
    for name, logprobs in tensors.items():
        ids, spans = ITEMS[name]
        scored = torch.tensor([ids[position] for start, end in spans for position in range(start, end)])
        expected = served.expected(name).log_softmax(-1).gather(1, scored[:, None])[:, 0]
        assert logprobs.dtype == torch.float32
        assert float((logprobs - expected).abs().max()) < 1e-4
    # A finished file is replaced by its like alone.
    assert opd_score(path, out, signal="token_logprobs")[0] == 0
    before = out.read_bytes()
    code, said = opd_score(path, out, signal="logits")
    assert code == 2
    assert f"{out} holds answers with signal token_logprobs, not logits: give another --out" in said
    assert out.read_bytes() == before


BAD_CANDIDATES: list[tuple[Any, str]] = [
    ([[1, 2]], "1 lists of ids for 4 scored tokens"),
    ([1, 2, 3, 4], "must be a list of 4 lists of 2 ids"),
    ([[1, 2], [1, 2], [1, 2, 3], [1, 2]], "candidate_token_ids[2]: 3 ids, but --top-k is 2"),
    ([[1, 2], [1, True], [1, 2], [1, 2]], "candidate_token_ids[1]: true is no token id"),
    ([[1, 2], [1, 2], [1, 2], [1, 131]], "candidate_token_ids[3]: token id 131 is outside the vocabulary of 131"),
]


def test_bad_candidates_are_told(opd_score: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line_of("plain") | {"trajectory_id": str(i), "candidate_token_ids": ids} for i, (ids, _) in
             enumerate(BAD_CANDIDATES)]  # fmt: skip
    path = write_lines(tmp_path / "in.jsonl", *lines, line_of("plain"))
    out = tmp_path / "out.jsonl"
    code, said = opd_score(path, out, signal="top_k_logprobs", **{"top-k": 2})
    assert code == 1
    for _, reason in BAD_CANDIDATES:
        assert reason in said
    assert said.endswith(f"1 marked, {len(BAD_CANDIDATES)} failed: {out}")
    out.unlink()
    write_lines(path, line_of("plain") | {"candidate_token_ids": [[1, 2]] * 4}, line_of("two spans"))
    code, said = opd_score(path, out, signal="token_logprobs")
    assert code == 1
    assert "candidate_token_ids: goes with --signal top_k_logprobs alone 1 marked, 1 failed" in said
    monkeypatch.setattr(score_module, "ROOM_BYTES", (8 << 20) - 12)  # 7 tokens and 8 candidates are more
    code, said = opd_score(path, tmp_path / "other.jsonl", signal="top_k_logprobs", **{"top-k": 2})
    assert code == 1
    assert "19 bytes of ids, but 12 fit a message; give a smaller --top-k" in said


BAD_LINES: list[tuple[Any, str]] = [
    ("{not json", "is not JSON"),
    ("[1, 2]", "must be a JSON object, found list"),
    (
        {"trajectory_id": "x", "token_ids": [1, 131, 3], "scored_spans": [[1, 3]]},
        "token id 131 at position 1 is outside",
    ),
    ({"trajectory_id": "x", "token_ids": [1, -1, 3], "scored_spans": [[1, 3]]}, "token id -1 is negative"),
    ({"trajectory_id": "x", "token_ids": [1, 2, 3], "scored_spans": [[0, 3]]}, "starts at 0"),
    ({"trajectory_id": "x", "token_ids": [1, 2, 3], "scored_spans": [[1, 4]]}, "ends at 4, beyond the 3"),
    ({"trajectory_id": "x", "token_ids": [1, 2, 3]}, "no scored token"),
    ({"trajectory_id": "x", "token_ids": [9] * 17, "scored_spans": [[1, 3]]}, "17 tokens, but at most 16"),
    ({"trajectory_id": "x", "token_ids": ["a"], "scored_spans": [[1, 3]]}, "token_ids"),
    ({"token_ids": [1, 2], "scored_spans": [[1, 2]]}, "trajectory_id: must not be empty"),
    ({"trajectory_id": "x", "tokens": [1, 2], "scored_spans": [[1, 2]]}, 'no field named "tokens"'),
    (line_of("plain"), "was on line 1 already"),
]


def test_bad_lines_are_told_and_the_others_marked(opd_score: Any, tmp_path: Path) -> None:
    bad = [line for line, _ in BAD_LINES]
    path = write_lines(tmp_path / "in.jsonl", line_of("plain"), *bad, line_of("two spans"))
    out = tmp_path / "out.safetensors"
    code, said = opd_score(path, out)
    assert code == 1
    for number, (_, reason) in enumerate(BAD_LINES, start=2):
        told = said.split(f"{path}:{number}: ", 1)[1].split(str(path), 1)[0]
        assert reason in told
    assert said.endswith(f"2 marked, {len(BAD_LINES)} failed: {out}")
    assert set(load_file(out)) == {"plain", "two spans"}
    # Once mended, only what is missing is asked for, and the lines beside the file go away.
    write_lines(path, *map(line_of, ITEMS))
    assert opd_score(path, out) == (0, f"1 marked, 2 there already: {out}")
    assert set(load_file(out)) == set(ITEMS)
    assert not list(tmp_path.glob("*.partial*"))


def test_what_concerns_all_ends_with_2(opd_score: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "in.jsonl", line_of("plain"))
    out = tmp_path / "out.jsonl"
    other = tmp_path / "tokenizer"
    tiny_tokenizer(129).save_pretrained(other)
    monkeypatch.setattr(score_module, "CONNECT_TIMEOUT_S", 0.5)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"fingerprint": None}, "exactly one of --tokenizer"),
        ({"tokenizer": other}, "exactly one of --tokenizer"),
        ({"fingerprint": "0" * 64}, "the ids come from another tokenizer"),
        ({"fingerprint": None, "tokenizer": other}, "token id 129 is absent in --tokenizer but"),
        ({"fingerprint": None, "tokenizer": tmp_path / "none"}, "does not exist"),
        ({"teacher": "art"}, "no teacher 'art' here; served are: math"),
        ({"address": "127.0.0.1:1"}, "was not ready within 0.5 s"),
        ({"address": "nowhere"}, "is not host:port"),
        ({"signal": "text"}, "--signal must be one of hidden_states, logits, top_k_logprobs, token_logprobs"),
        ({"signal": "top_k_logprobs"}, "--signal top_k_logprobs needs --top-k K"),
        ({"top-k": 4}, "--top-k goes with --signal top_k_logprobs alone; leave it out for hidden_states"),
        ({"signal": "top_k_logprobs", "top-k": 0}, "--top-k must be from 1 to 131, what teacher 'math' allows"),
        ({"signal": "top_k_logprobs", "top-k": 132}, "--top-k must be from 1 to 131"),
        ({"dtype": "int8"}, "--dtype must be one of float32, bfloat16, float16"),
        ({"cert-file": other}, "--cert-file and --key-file go together"),
    ]
    for options, reason in cases:
        code, said = opd_score(path, out, **options)
        assert (code, said.startswith("error: ")) == (2, True), said
        assert reason in said
    for trajectories, target, reason in (
        (tmp_path / "absent.jsonl", out, "there is no file"),
        (path, tmp_path / "out.npz", "--out must end in .safetensors or .jsonl"),
        (path, path, "the file of the trajectories itself"),
        (path, tmp_path / "no" / "out.jsonl", "there is no folder"),
    ):
        code, said = opd_score(trajectories, target)
        assert code == 2
        assert reason in said
    assert not out.exists()


def test_a_file_that_is_no_answer_is_left_alone(opd_score: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", line_of("plain"))
    out = write_lines(tmp_path / "notes.jsonl", "my notes")
    code, said = opd_score(path, out)
    assert code == 2
    assert "line 1, is no answer of opd score" in said
    assert out.read_text() == "my notes\n"
    out = write_lines(tmp_path / "notes.safetensors", "my notes, which are longer than eight bytes")
    code, said = opd_score(path, out)
    assert code == 2
    assert f"{out} is no output of opd score: give another --out, or remove it" in said
    assert out.read_text().startswith("my notes")


def test_overload_is_waited_for_and_a_lost_server_ends_the_rest(
    opd_score: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "in.jsonl", *map(line_of, ITEMS))
    out = tmp_path / "out.safetensors"
    asked: list[int] = []
    really_score = TeacherClient.score

    async def score(self: TeacherClient, request: ScoreRequest) -> ScoreResult:
        asked.append(len(request.token_ids))
        if len(request.token_ids) == 2:  # "one/token"
            raise UnavailableError("the stream is broken")
        if len(asked) == 1:
            raise OverloadedError("too much", retry_delay_s=0.01)
        return await really_score(self, request)

    monkeypatch.setattr(TeacherClient, "score", score)
    monkeypatch.setattr(score_module, "RETRY_DELAY_S", 0.01)
    code, said = opd_score(path, out)
    assert code == 2
    assert f"the same command continues from {out}.partial.jsonl error: the stream is broken" in said
    assert asked.count(2) == score_module.MAX_ATTEMPTS
    assert not out.exists()
    monkeypatch.setattr(TeacherClient, "score", really_score)
    code, said = opd_score(path, out)
    assert code == 0
    assert "there already" in said
    assert set(load_file(out)) == set(ITEMS)


def test_replicas_that_are_all_overloaded_are_waited_for(
    served: Served, opd_score: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "in.jsonl", *({**line_of("plain"), "trajectory_id": str(i)} for i in range(12)))
    out = tmp_path / "out.safetensors"
    sent = itertools.count()
    really_score = ScoringStream.score

    async def score(self: ScoringStream, request: ScoreRequest) -> ScoreResult:
        number = next(sent)
        if number < 4:  # as many as begin together: each replica refuses two of them, and all while both are busy
            await asyncio.sleep(0.05)
            if number < 2:
                raise OverloadedError("full", retry_delay_s=0.5)
        return await really_score(self, request)

    monkeypatch.setattr(ScoringStream, "score", score)
    addresses = [served.address, served.address.replace("127.0.0.1", "localhost")]
    assert opd_score(path, out, address=addresses) == (0, f"12 marked: {out}")
    assert len(load_file(out)) == 12
    assert next(sent) >= 14
