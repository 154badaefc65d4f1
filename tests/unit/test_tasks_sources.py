"""Sources of items: functions of (seed, index), and files whose mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from task_cases import jsonl, make_domain
from tiny_models import tiny_tokenizer

from opd_mesh.config.domains import JsonlSource, ReasoningGymSource
from opd_mesh.errors import ConfigError, TokenizerMismatchError
from opd_mesh.models.tokenizer import tokenizer_fingerprint
from student_trainer.tasks.jsonl import read_items
from student_trainer.tasks.sources import ReasoningGym, Source, open_source


# --- JSONL ----------------------------------------------------------------------------------------------------
def prompts_file(folder: Path, count: int, name: str = "p.jsonl", start: int = 0) -> Path:
    return jsonl(folder / name, [{"prompt": f"question {index}"} for index in range(start, start + count)])


def lines_source(source: JsonlSource, seed: int, heldout: int) -> Source:
    return open_source(source, seed=seed, field="domains.d.jsonl", tokenizer=None, heldout_count=heldout)


def question(item: Any) -> str:
    return item.question


@given(count=st.integers(2, 9), heldout=st.integers(0, 4), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=30)
def test_every_epoch_is_a_permutation_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, count: int, heldout: int, seed: int
) -> None:
    path = prompts_file(tmp_path_factory.getbasetemp(), count + heldout)
    source = lines_source(JsonlSource(path=path), seed, heldout)
    lines = {f"question {index}" for index in range(count)}
    drawn = [question(source.train(index)) for index in range(5 * count)]
    epochs = [drawn[start : start + count] for start in range(0, 5 * count, count)]
    assert all(set(epoch) == lines for epoch in epochs)
    assert [question(source.heldout(i)) for i in range(heldout)] == [f"question {count + i}" for i in range(heldout)]
    assert source.heldout(heldout) is None
    # A function of (seed, index): backwards, and in another process, it says the same.
    again = lines_source(JsonlSource(path=path), seed, heldout)
    assert [question(again.train(index)) for index in reversed(range(5 * count))] == drawn[::-1]


def test_the_order_is_what_it_was(tmp_path: Path) -> None:
    """Recorded runs depend on it."""
    source = lines_source(JsonlSource(path=prompts_file(tmp_path, 6)), 7, 0)
    assert [question(source.train(index))[-1] for index in range(12)] == list("421305423150")


def test_orders_differ_between_epochs_and_seeds(tmp_path: Path) -> None:
    path = prompts_file(tmp_path, 12)
    orders = set()
    for seed in range(3):
        source = lines_source(JsonlSource(path=path), seed, 0)
        orders |= {tuple(question(source.train(epoch * 12 + index)) for index in range(12)) for epoch in range(3)}
    assert len(orders) == 9


def test_a_heldout_file_is_used_and_leaves_all_lines_for_training(tmp_path: Path) -> None:
    source = JsonlSource(path=prompts_file(tmp_path, 3), heldout=prompts_file(tmp_path, 2, "h.jsonl", start=50))
    opened = lines_source(source, 0, 99)
    assert {question(opened.train(index)) for index in range(3)} == {"question 0", "question 1", "question 2"}
    assert [question(opened.heldout(index)) for index in range(2)] == ["question 50", "question 51"]
    assert opened.heldout(2) is None


def test_too_few_lines_to_hold_any_out(tmp_path: Path) -> None:
    path = prompts_file(tmp_path, 3)
    with pytest.raises(
        ConfigError, match=r"has 3 prompts, and 3 are held out.*evaluation\.accuracy\.prompts_per_domain.*splits"
    ):
        lines_source(JsonlSource(path=path), 0, 3)
    source = open_source(
        JsonlSource(path=path), seed=0, field="f", tokenizer=None, heldout_count=5, trained=False
    )  # it is only evaluated
    assert question(source.heldout(0)) == "question 0"


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', "not JSON"),
        ("[1]", 'exactly one of "prompt" (text) and "messages"'),
        ('"text"', "exactly one of"),
        ('{"question": "x"}', "exactly one of"),
        ('{"prompt": "x", "messages": []}', "exactly one of"),
        ('{"prompt": " "}', "text that is not empty"),
        ('{"prompt": 3}', "text that is not empty"),
        ('{"prompt": "x", "answer": [3]}', "the answer must be text or a number, found list"),
        ('{"prompt": "x", "answer": true}', "the answer must be text or a number, found bool"),
        ('{"prompt": "x", "metadata": [3]}', '"metadata" must be a mapping'),
        ('{"messages": []}', "must be a list of turns"),
        ('{"messages": "hi"}', "must be a list of turns"),
        ('{"messages": [{"role": "user"}]}', 'every turn needs "role" and "content"'),
        ('{"messages": ["hi"]}', "every turn needs"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "every turn needs"),
        (json.dumps({"messages": TURNS, "answer": "c"}), "there can be one gold answer"),
        (json.dumps({"messages": TURNS[1:]}), "there is nothing to answer"),
        (json.dumps({"messages": TURNS + TURNS[1:]}), "there is nothing to answer"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "good"}\n\n' + line + "\n")
    with pytest.raises(ConfigError) as caught:
        read_items(path, "domains.d.jsonl.path")
    assert f"{path}, line 3: " in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.field == "domains.d.jsonl.path"


def test_files_without_prompts(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, message in (("empty", "holds no prompt"), ("binary", "cannot read"), ("absent", "cannot read")):
        with pytest.raises(ConfigError, match=message):
            read_items(tmp_path / name, "f")


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    # U+2028, U+0085 and the like may stand in JSON text as they are; str.splitlines would cut there.
    text = "a\u2028b\u2029c\u0085d"
    path = tmp_path / "p.jsonl"
    for end in ("\n", "\r\n"):
        path.write_bytes((json.dumps({"prompt": text}, ensure_ascii=False) + end).encode() * 2)
        assert [question(item) for item in read_items(path, "f")] == [text, text]


def test_a_line_has_turns_an_answer_and_metadata(tmp_path: Path) -> None:
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "n"}
    kept = [system, {"role": "user", "content": "u"}]
    lines = [
        {"messages": [system, user], "source": "x"},
        {"messages": [system, user, {"role": "assistant", "content": "gold"}], "metadata": {"level": 3}},
        {"prompt": "p", "answer": "gold"},
        {"prompt": "p", "answer": 42},
    ]
    bare, turns, text, number = read_items(jsonl(tmp_path / "p.jsonl", lines), "f")
    assert (bare.messages, bare.answer, bare.metadata) == (kept, None, {})
    assert (turns.messages, turns.answer, turns.metadata) == (kept, "gold", {"level": 3})
    assert text.entry == {"question": "p", "answer": "gold", "metadata": {}}
    assert number.answer == "42"


# --- reasoning-gym --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 2**62])
def test_reasoning_gym_is_a_function_of_seed_and_index(seed: int) -> None:
    source = ReasoningGymSource(task="chain_sum", params={"min_terms": 3, "max_terms": 4})
    one, two = ReasoningGym(source, seed, "f"), ReasoningGym(source, seed, "f")
    forward = [question(one.train(index)) for index in range(8)]
    assert [question(two.train(index)) for index in reversed(range(8))] == forward[::-1]
    assert len(set(forward)) == 8
    heldout = [question(one.heldout(index)) for index in range(8)]
    assert heldout == [question(two.heldout(index)) for index in range(8)]
    assert not set(heldout) & set(forward)
    other = [question(ReasoningGym(source, seed + 100, "f").train(index)) for index in range(8)]
    assert not set(other) & set(forward)


@pytest.mark.parametrize(
    ("task", "params"), [("no_such_task", {}), ("chain_sum", {"no_such": 1}), ("chain_sum", {"min_terms": -1})]
)
def test_what_reasoning_gym_refuses_is_a_config_error(task: str, params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="reasoning-gym refuses this") as caught:
        ReasoningGym(ReasoningGymSource(task=task, params=params), 0, "domains.d.reasoning_gym")
    assert caught.value.field == "domains.d.reasoning_gym"


# --- Hugging Face datasets ------------------------------------------------------------------------------------
ROWS: dict[str, list[Any]] = {
    "problem": ["one", "two", "three", "four"],
    "solution": [1, 2, 3, 4],
    "level": [0, 0, 1, 1],
}
FIELDS = {"prompt_field": "problem", "answer_field": "solution"}


def saved(folder: Path) -> dict[str, Any]:
    datasets.Dataset.from_dict(ROWS).save_to_disk(str(folder / "plain"))
    return {"path": folder / "plain"}


def saved_with_splits(folder: Path) -> dict[str, Any]:
    whole = datasets.Dataset.from_dict(ROWS)
    # Chosen rows: an indices mapping above the table.
    both = datasets.DatasetDict(train=whole.select([1, 0, 2, 3]), test=whole.select([1]))
    both.save_to_disk(str(folder / "splits"))
    return {"path": folder / "splits", "split": "train"}


def parquet_file(folder: Path) -> dict[str, Any]:
    parquet.write_table(pyarrow.table(ROWS), folder / "rows.parquet")
    return {"path": folder / "rows.parquet"}


def parquet_folder(folder: Path) -> dict[str, Any]:
    table = pyarrow.table(ROWS)
    (folder / "hub" / "data").mkdir(parents=True)
    for name, rows in (("train-00000-of-00002", table[:2]), ("train-00001-of-00002", table[2:]), ("test-0", table[:1])):
        parquet.write_table(rows, folder / "hub" / "data" / f"{name}.parquet")
    return {"path": folder / "hub", "split": "train"}


@pytest.mark.parametrize("make", [saved, saved_with_splits, parquet_file, parquet_folder])
def test_a_dataset_on_disk(tmp_path: Path, make: Any) -> None:
    domain = make_domain({"dataset": {**make(tmp_path), **FIELDS}}, heldout=1)
    (heldout,) = domain.heldout
    assert (domain.item(heldout).question, domain.item(heldout).answer) == ("four", "4")
    prompts, _ = domain.after(0, 3)
    items = {item.question: item for item in map(domain.item, prompts)}
    assert set(items) == {"one", "two", "three"}
    assert items["three"].entry == {"question": "three", "answer": "3", "metadata": {"level": 1}}


def test_a_datasets_turns_and_its_own_heldout_split(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(3)]
    whole = datasets.Dataset.from_dict({"chat": turns})
    datasets.DatasetDict(train=whole.select([0]), dev=whole.select([1, 2])).save_to_disk(str(tmp_path / "d"))
    source = {"path": tmp_path / "d", "split": "train", "heldout_split": "dev", "messages_field": "chat"}
    domain = make_domain({"dataset": source}, heldout=2)
    assert [domain.item(prompt).answer for prompt in domain.heldout] == ["a1", "a2"]
    assert [domain.item(prompt).question for prompt in domain.after(0, 2)[0]] == ["q0", "q0"]


@pytest.mark.parametrize(
    ("make", "change", "field", "message"),
    [
        (saved, {"path": "absent"}, "path", "does not exist"),
        (saved, {"prompt_field": "question"}, "prompt_field", "no column 'question', only problem, solution, level"),
        (saved, {"answer_field": "gold"}, "answer_field", "no column 'gold'"),
        (saved, {"split": "train"}, "split", "has no splits"),
        (saved_with_splits, {"split": None}, "split", "no split is named; .* has train, test"),
        (saved_with_splits, {"heldout_split": "dev"}, "split", "there is no split 'dev'"),
        (parquet_folder, {"split": "dev"}, "split", "no files of split 'dev', only data/test-0.parquet"),
        (parquet_folder, {"split": None}, "split", "files of the splits test, train; name one"),
        (parquet_file, {"prompt_field": "level"}, "", 'row 0: "prompt" must be text'),
    ],
)
def test_a_dataset_that_is_not_as_named(
    tmp_path: Path, make: Any, change: dict[str, Any], field: str, message: str
) -> None:
    source = {**make(tmp_path), **FIELDS, **change}
    with pytest.raises(ConfigError, match=message) as caught:
        make_domain({"dataset": source})
    assert caught.value.field == "domains.d.dataset" + (f".{field}" if field else "")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train/0000", "test/0000"], "test, train"),
        (["a-00000-of-00001", "b-00000-of-00001"], "a, b"),
        (["validation", "train_2"], "train, validation"),
        (["train-0", "train-1"], None),
        (["part0", "part1", "other/part0"], None),  # parts of one
    ],
)
def test_a_folder_of_several_splits_is_not_read_as_one(tmp_path: Path, names: list[str], splits: str | None) -> None:
    for name in names:
        file = tmp_path / f"{name}.parquet"
        file.parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.table(ROWS), file)
    source = {"path": tmp_path, **FIELDS}
    if splits is None:
        assert len(make_domain({"dataset": source}, heldout=1).heldout) == 1
    else:
        with pytest.raises(ConfigError, match=f"files of the splits {splits}; name one") as caught:
            make_domain({"dataset": source})
        assert caught.value.field == "domains.d.dataset.split"


def test_files_that_are_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    for name, message in (("empty", "neither a dataset"), ("bad.parquet", "cannot read"), ("saved", "cannot read")):
        with pytest.raises(ConfigError, match=message):
            make_domain({"dataset": {"path": tmp_path / name, **FIELDS}})


# --- trajectories ---------------------------------------------------------------------------------------------
OURS = tokenizer_fingerprint(tiny_tokenizer().get_vocab())


def trajectory(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "trajectory_id": f"t{number}",
        "domain": "sums",
        "token_ids": [1, 5 + number, 6, 7, 2],
        "scored_spans": [[2, 5]],
        "tokenizer_fingerprint": OURS,
        **changes,
    }


def test_trajectories_are_prompts_with_their_own_responses(tmp_path: Path) -> None:
    spans = [{"start": 2, "end": 5}]
    lines = [trajectory(0), trajectory(1, scored_spans=spans), trajectory(2, policy_versions=[1, 1, 1], score=0.5)]
    domain = make_domain(
        {"trajectories": {"path": jsonl(tmp_path / "t.jsonl", lines)}, "teachers": {"t": 1}}, heldout=1
    )
    assert [prompt.token_ids for prompt in domain.heldout] == [(1, 7)]
    prompts, _ = domain.after(0, 2)
    assert sorted(prompt.token_ids for prompt in prompts) == [(1, 5), (1, 6)]
    for prompt in prompts:
        assert domain.solution(prompt) == (6, 7, 2)
        assert domain.item(prompt).metadata["domain"] == "sums"
    assert domain.item(domain.heldout[0]).metadata["score"] == 0.5


def test_what_was_cancelled_is_not_learned(tmp_path: Path) -> None:
    cut = [trajectory(1, finish_reason="cancelled"), trajectory(2, finish_reason="cancelled", scored_spans=[])]
    path = jsonl(tmp_path / "t.jsonl", [*cut, trajectory(3, finish_reason="stop")])
    domain = make_domain({"trajectories": {"path": path}}, heldout=0)
    assert {domain.item(prompt).metadata["trajectory_id"] for prompt in domain.after(0, 3)[0]} == {"t3"}


def test_trajectories_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", [trajectory(0), trajectory(1, tokenizer_fingerprint="ab" * 32)])
    with pytest.raises(TokenizerMismatchError, match=r"line 2: .*another tokenizer \(abababababababab…\)") as caught:
        make_domain({"trajectories": {"path": path}})
    assert caught.value.field == "domains.d.trajectories.path"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([1], "must be a JSON object"),
        (trajectory(0, tokenizer_fingerprint=None), "tokenizer_fingerprint: is required"),
        (trajectory(0, scored_spans=[[2, 4]]), "must be one span that ends with the sequence"),
        (trajectory(0, scored_spans=[[2, 3], [4, 5]]), "must be one span"),
        (trajectory(0, scored_spans=[]), "no scored token"),
        (trajectory(0, scored_spans=[[2, 9]]), "beyond the 5 token_ids"),
        (trajectory(0, scored_spans=None), "no scored token"),
        (trajectory(0, token_ids=[1, 2, 3, 4, 131]), "outside the vocabulary of 131"),
        (trajectory(0, token_ids="text"), "token_ids"),
        ({"tokenizer_fingerprint": OURS, "scored_spans": [[2, 5]]}, "trajectory_id: must not be empty"),
    ],
)
def test_a_bad_trajectory_is_named_by_file_and_number(tmp_path: Path, line: Any, message: str) -> None:
    path = jsonl(tmp_path / "t.jsonl", [trajectory(7), line])
    with pytest.raises(ConfigError) as caught:
        make_domain({"trajectories": {"path": path}})
    assert f"{path}, line 2: " in str(caught.value)
    assert message in str(caught.value)


def test_gold_answers_where_a_verifier_compares_with_them(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "p", "answer": "a"}, {"prompt": "p"}])
    for name in ("exact", "number"):
        with pytest.raises(ConfigError, match=f'line 2: needs "answer", which verifier {name} compares with'):
            make_domain({"jsonl": {"path": path}, "verifier": {"name": name}})
    (tmp_path / "d").mkdir()
    source = {**parquet_file(tmp_path / "d"), "prompt_field": "problem"}
    with pytest.raises(ConfigError, match="holds no answer, which verifier exact compares with; name answer_field"):
        make_domain({"dataset": source, "verifier": {"name": "exact"}})
