"""The grader: verifiers in a process of their own, whose failures are counted and never a score of 0."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from task_cases import SPELL, domain_of, jsonl, make_domain, recipe_of
from tiny_models import tiny_tokenizer

from opd_mesh.errors import ConfigError, OpdError
from student_trainer.tasks import Domain, Grade, Grader, Prompt, open_domains
from student_trainer.tasks.grader import JOBS_AT_ONCE, _Child

BEHAVE = {"name": "python", "function": "task_cases:behave", "timeout_s": 60.0}
RIGHT, UNPARSED = Grade(1.0, parsed=True), Grade(0.0, parsed=False)


@pytest.fixture
def domain(tmp_path: Path) -> Domain:
    lines = [{"prompt": "q", "answer": "g", "metadata": {"level": 2}}]
    return make_domain({"jsonl": {"path": jsonl(tmp_path / "p.jsonl", lines)}, "verifier": BEHAVE}, heldout=0)


@pytest.fixture
async def grader(domain: Domain) -> AsyncIterator[Grader]:
    grader = Grader([domain])
    await grader.start()
    yield grader
    await grader.close()


def entries(domain: Domain, texts: Sequence[str]) -> list[tuple[Prompt, str]]:
    prompts, _ = domain.after(0, len(texts))
    return list(zip(prompts, texts, strict=True))


def child_of(grader: Grader) -> int:
    assert grader._child is not None
    pid = grader._child._process.pid
    assert pid is not None
    return pid


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_what_a_verifier_does_is_told_of_its_own_answer(domain: Domain, grader: Grader) -> None:
    texts = ["gold", "0", "raise", "", "nan", "1.5", "exit", "text", "0.5"]
    grades = await grader.grade("d", entries(domain, texts))
    scores = [grade.score for grade in grades]
    assert scores == [1.0, 0.0, None, 0.0, None, None, None, None, 0.5]
    assert [grade.failure is not None for grade in grades] == [score is None for score in scores]
    assert [grade.parsed for grade in grades] == [True, True, False, False, False, False, False, False, True]


async def test_a_crash_is_a_failure_and_the_neighbours_are_graded(domain: Domain, grader: Grader) -> None:
    first = child_of(grader)
    grades = await grader.grade("d", entries(domain, ["gold", "crash", "0.5", "crash", "gold"]))
    assert [grade.score for grade in grades] == [1.0, None, 0.5, None, 1.0]
    assert grades[1].failure == "the verifier ended its process (exit code 3)"
    assert child_of(grader) != first
    assert not is_alive(first)


async def test_a_hang_ends_at_its_time_and_the_neighbours_are_graded(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "q", "answer": "g", "metadata": {"level": 2}}])
    slow = {"jsonl": {"path": path}, "verifier": {**BEHAVE, "timeout_s": 1.5}}
    regex = {
        "jsonl": {"path": path},
        "verifier": {**slow["verifier"], "extract": {"name": "regex", "pattern": "(a+)+b"}},
    }
    domains = [make_domain(slow, heldout=0), domain_of(recipe_of(regex, heldout=0), name="r")]
    grader = Grader(domains)
    await grader.start()
    try:
        grades = await grader.grade("d", entries(domains[0], ["gold", "hang", "0.5"]))
        assert grades == [RIGHT, Grade(None, False, "the verifier took longer than 1.5 s"), Grade(0.5, True)]
        # Nor does it help to have begun to answer.
        (begun,) = await grader.grade("d", entries(domains[0], ["write"]))
        assert begun.failure == "the verifier took longer than 1.5 s"
        # Extraction is in there, too: this pattern takes for ever on this text.
        (hung,) = await grader.grade("r", entries(domains[1], ["a" * 64]))
        assert hung.failure == "the verifier took longer than 1.5 s"
        assert (await grader.grade("d", entries(domains[0], ["gold"])))[0] == RIGHT
    finally:
        await grader.close()


async def test_the_event_loop_goes_on_meanwhile(domain: Domain, grader: Grader) -> None:
    task = asyncio.create_task(grader.grade("d", entries(domain, ["hang"])))
    for _ in range(20):  # would not come back
        await asyncio.sleep(0.005)
    assert not task.done()
    pid = child_of(grader)
    await grader.close()  # ends what hangs
    assert not is_alive(pid)
    with pytest.raises(OpdError, match="closed"):
        await grader.grade("d", entries(domain, ["gold"]))
    await asyncio.gather(task, return_exceptions=True)


async def test_many_at_once_and_out_of_several_tasks(domain: Domain, grader: Grader) -> None:
    texts = [str(number % 11 / 10) for number in range(JOBS_AT_ONCE * 2 + 3)]
    batches = await asyncio.gather(*(grader.grade("d", entries(domain, texts[start:])) for start in range(3)))
    for start, grades in enumerate(batches):
        assert [grade.score for grade in grades] == [float(text) for text in texts[start:]]
    assert await grader.grade("d", []) == []


async def test_the_families_of_reasoning_gym(tmp_path: Path) -> None:
    recipe = recipe_of({**SPELL, "verifier": {"name": "reasoning_gym"}, "effort": "high"})
    (domain,) = open_domains(recipe, tiny_tokenizer())
    grader = Grader([domain])
    await grader.start()
    try:
        prompts, _ = domain.after(0, 40)
        answers = [domain.item(prompt).answer for prompt in prompts]
        right = await grader.grade("d", [(p, f"hm</think>{a}") for p, a in zip(prompts, answers, strict=True)])
        assert right == [RIGHT] * 40
        open_end = await grader.grade("d", [(p, f"{a}") for p, a in zip(prompts, answers, strict=True)])
        assert open_end == [UNPARSED] * 40
        held = domain.heldout[0]
        assert (await grader.grade("d", [(held, f"</think>{domain.item(held).answer}")]))[0] == RIGHT
    finally:
        await grader.close()


async def test_other_prompts_have_no_score_and_no_failure(tmp_path: Path) -> None:
    others = {"jsonl": {"path": jsonl(tmp_path / "o.jsonl", [{"prompt": "o"}])}, "share": 0.5}
    domain = make_domain({**SPELL, "verifier": {"name": "reasoning_gym"}, "others": others})
    grader = Grader([domain])
    try:
        prompts, _ = domain.after(0, 4)
        grades = await grader.grade("d", [(prompt, domain.item(prompt).answer or "x") for prompt in prompts])
        assert grades == [Grade(None, parsed=False) if prompt.other else RIGHT for prompt in prompts]
    finally:
        await grader.close()


async def test_an_item_that_cannot_be_sent_is_a_failure(
    domain: Domain, grader: Grader, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = domain.item(domain.after(0, 1)[0][0])
    items = iter([good, type(good)(good.messages, "g", {"f": lambda: 0}, {}), good])
    monkeypatch.setattr(domain, "item", lambda prompt: next(items))
    grades = await grader.grade("d", entries(domain, ["gold", "gold", "gold"]))
    assert [grade.score for grade in grades] == [1.0, None, 1.0]
    assert "the item cannot be sent" in (grades[1].failure or "")


async def test_a_verifier_that_cannot_be_opened_is_told_at_the_start(tmp_path: Path) -> None:
    domain = make_domain({**SPELL, "verifier": {"name": "python", "function": "task_cases:absent"}})
    grader = Grader([domain])
    with pytest.raises(ConfigError, match="cannot import task_cases:absent") as caught:
        await grader.start()
    assert caught.value.field == "domains.d.verifier.function"
    await grader.close()


async def test_closing_ends_a_process_that_is_still_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(3600)\n")
    monkeypatch.syspath_prepend(tmp_path)
    domain = make_domain({**SPELL, "verifier": {"name": "python", "function": "slow_to_import:score"}})
    grader = Grader([domain])
    starting = asyncio.create_task(grader.start())
    while grader._child is None:
        await asyncio.sleep(0.005)
    pid = child_of(grader)
    await asyncio.wait_for(grader.close(), 60)  # shorter than it may take to start
    assert not is_alive(pid)
    with pytest.raises(OpdError):
        await starting


def test_a_process_that_cannot_be_started_leaves_no_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="no memory"):
        _Child()
    assert os.listdir("/proc/self/fd") == before


async def test_without_verifiers_there_is_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(_Child, "__init__", refuse)
    grader = Grader([make_domain(SPELL)])
    await grader.start()
    with pytest.raises(ConfigError, match="domain d has no verifier") as caught:
        await grader.grade("d", [])
    assert caught.value.field == "domains.d.verifier"
    await grader.close()


PARENT = """
import asyncio, os, sys
from pathlib import Path
from task_cases import make_domain
from student_trainer.tasks import Grader

async def main():
    source = {"jsonl": {"path": Path(sys.argv[1])}, "verifier": {"name": "python", "function": "task_cases:behave"}}
    domain = make_domain(source, heldout=0)
    grader = Grader([domain])
    await grader.start()
    print(grader._child._process.pid, flush=True)
    await grader.grade("d", [(domain.after(0, 1)[0][0], "hang")])

asyncio.run(main())
"""


def test_a_killed_parent_leaves_no_process(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "q", "answer": "g"}])
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (root, root / "protos", root / "tests")))}
    command = [sys.executable, "-c", PARENT, str(path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 30
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(child)


def test_the_process_imports_no_torch() -> None:
    code = "import sys, student_trainer.tasks.grading; print(*{'torch', 'transformers', 'datasets'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
