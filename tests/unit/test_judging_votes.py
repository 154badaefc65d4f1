"""From votes to verdicts, and whose policy they were: pure functions against figures by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from opd.v1 import common_pb2
from opd.v1 import generative_reward_service_pb2 as pb
from tiny_models import tiny_tokenizer
from tokenizers import AddedToken

from grm_server.items import check_item, digest_of
from grm_server.judging import policy_behind
from grm_server.verdicts import Vote, pair_verdicts, read_vote, verdict_of
from opd_mesh.config.base import parse_config
from opd_mesh.config.rubrics import Criterion, Rubric, RubricLibrary, Scale, load_rubric
from opd_mesh.config.services import GrmServerConfig
from opd_mesh.errors import ConfigError, InvalidInputError
from opd_mesh.judging.messages import rubric_from_proto, rubric_to_proto
from opd_mesh.judging.plain import special_tokens, taken_apart
from opd_mesh.policy import PolicyId
from opd_mesh.trajectory import Trajectory

RUBRIC = Rubric(
    name="r",
    criteria=[Criterion(name="a"), Criterion(name="b", scale=Scale(min=0, max=1), weight=3)],
    max_reason_chars=40,
)


def vote(text: str, *, answer: int = 0, swapped: bool = False, pairwise: bool = False, failure: str = "") -> Vote:
    return read_vote(
        RUBRIC, text, answer_index=answer, swapped=swapped, pairwise=pairwise, request_id="id", failure=failure
    )


# --- one answer ------------------------------------------------------------------------------------------------
def test_mean_variance_and_agreement_by_hand() -> None:
    # Overall: (1 · 1 + 3 · 1) / 4 = 1, (0 + 3) / 4 = 0.75 twice.
    votes = [vote("a: best | 5\nb: yes | 1"), vote("a: worst | 1\nb: so | 1"), vote("a: poor | 1\nb: ok | 1")]
    votes.append(vote("no idea"))
    verdict = verdict_of(RUBRIC, votes)
    assert verdict.score == pytest.approx(2.5 / 3)
    assert verdict.score_variance == pytest.approx(((1 - 2.5 / 3) ** 2 + 2 * (0.75 - 2.5 / 3) ** 2) / 3)
    assert verdict.agreement == pytest.approx(2 / 3)
    assert (verdict.samples_parsed, verdict.samples_asked, verdict.samples_repaired) == (3, 4, 0)
    assert [(one.name, one.score) for one in verdict.criteria] == [("a", pytest.approx(7 / 3)), ("b", 1.0)]
    # Of the first vote with the majority's score.
    assert [one.reason for one in verdict.criteria] == ["worst", "so"]
    assert verdict.failure == ""


def test_of_equals_the_first_vote_tells_and_repairs_are_counted() -> None:
    verdict = verdict_of(RUBRIC, [vote(" a: first | 5.0\n\nb: x | 0"), vote("a: second | 1\nb: y | 1")])
    assert verdict.criteria[0].reason == "first"
    assert verdict.agreement == 0.5
    assert verdict.samples_repaired == 1


def test_what_does_not_parse_is_never_scored() -> None:
    verdict = verdict_of(RUBRIC, [vote("5"), vote("a: x | 5\nb: y | 1", failure="cut at max_verdict_tokens (3)")])
    assert (verdict.score, verdict.samples_parsed, verdict.samples_asked, list(verdict.criteria)) == (0, 0, 2, [])
    assert "cut at max_verdict_tokens (3) (1 of 2)" in verdict.failure
    assert "not a verdict: 1 lines for 2 criteria (1 of 2)" in verdict.failure


# --- a pair ----------------------------------------------------------------------------------------------------
def pair(first: str, second: str, *, swapped: bool = False) -> Vote:
    return vote(f"a: of a | {first}\nb: of b | {second}", swapped=swapped, pairwise=True)


def test_a_judge_with_eyes_for_a_place_says_nothing() -> None:
    for choice in ("A", "B"):
        verdicts = pair_verdicts(RUBRIC, [pair(choice, choice), pair(choice, choice, swapped=True)])
        assert [verdict.score for verdict in verdicts] == [0.5, 0.5]


def test_each_order_counts_one_half_however_many_of_it_parse() -> None:
    votes = [pair("A", "A"), pair("A", "A"), pair("B", "A", swapped=True), vote("?", swapped=True, pairwise=True)]
    first, second = pair_verdicts(RUBRIC, votes)
    # Given order 1; swapped: B is the first one, so criterion a says 1 and b 0, of weights 1 and 3: 0.25.
    assert first.score == pytest.approx((1 + 0.25) / 2)
    assert first.score + second.score == pytest.approx(1)
    assert first.score_variance == second.score_variance == pytest.approx(0.375**2)
    assert [one.score for one in first.criteria] == pytest.approx([1.0, 0.5])
    assert [one.score for one in second.criteria] == pytest.approx([0.0, 0.5])
    assert (first.samples_parsed, first.samples_asked) == (3, 4)


def test_one_order_alone_is_no_verdict() -> None:
    verdicts = pair_verdicts(RUBRIC, [pair("A", "A"), vote("?", swapped=True, pairwise=True)])
    assert verdicts[0] == verdicts[1]
    assert verdicts[0].failure.startswith("only the given order parsed, and one order alone says nothing: ")
    assert verdicts[0].score == 0


# --- whose it was ----------------------------------------------------------------------------------------------
OLD, NEW = PolicyId("run", 1, 4, "old"), PolicyId("run", 1, 5, "new")


def by(lineage: int, *versions: int) -> Trajectory:
    return Trajectory(
        "id", "judge", (1, *versions), ((1, 1 + len(versions)),), policy_versions=versions, lineage=lineage
    )


@pytest.mark.parametrize(
    ("trajectories", "asked", "now", "author"),
    [
        ([by(1, 4, 4), by(1, 4)], OLD, OLD, OLD),
        ([by(1, 4, 4), by(1, 5)], OLD, NEW, None),
        ([by(1, 4, 5)], OLD, NEW, None),
        ([by(1, 4, 4)], OLD, NEW, OLD),  # it came behind the last token
        ([by(1, 5, 5)], OLD, NEW, NEW),  # it came before the first
        ([by(1, 5, 5)], OLD, PolicyId("run", 1, 6, "newer"), None),  # of one we never heard of
        ([by(2, 4)], OLD, OLD, None),
        # Begun in a lineage, and gone on with in the next: the tokens do not tell which of the two wrote them.
        ([by(1, 4)], OLD, PolicyId("run", 2, 4, "resumed"), None),
        ([by(1, 4)], OLD, PolicyId("other", 1, 4, "other"), None),
        # Two frozen checkpoints, one behind the other at one address.
        ([by(0, 0)], PolicyId("frozen.a", 0, 0, "a"), PolicyId("frozen.b", 0, 0, "b"), None),
        ([by(1)], OLD, NEW, NEW),  # cancelled before the first token
        ([], OLD, NEW, NEW),
    ],
)
def test_one_policy_wrote_all_of_it_or_none_is_named(
    trajectories: list[Trajectory], asked: PolicyId, now: PolicyId, author: PolicyId | None
) -> None:
    assert policy_behind(trajectories, asked, now) == author


# --- items -----------------------------------------------------------------------------------------------------
def config(**fields: object) -> GrmServerConfig:
    return parse_config(GrmServerConfig, {"model": "m", **fields}, source="test")


def item(**fields: object) -> pb.JudgeItem:
    values: dict[str, object] = {"prompt": "p", "answers": ["a"], "rubric_name": "r"}
    return pb.JudgeItem(**(values | fields))  # type: ignore[arg-type]


def test_an_items_digest_is_of_all_that_a_vote_depends_on() -> None:
    library = RubricLibrary([RUBRIC, RUBRIC.replace(version="2", description="other")])
    base = check_item(item(), config(), library)
    assert base.rubric.version == "2"
    sampling = common_pb2.SamplingParams(seed=0, temperature=0.5)
    others = [
        item(prompt="q"), item(answers=["b"]), item(answers=["a", "a"]), item(reference="x"), item(rubric_name="r@1"),
        item(answers=["a", "a"], mode=pb.JUDGE_MODE_PAIRWISE), item(sampling=sampling),
        item(sampling=common_pb2.SamplingParams(seed=1)),
    ]  # fmt: skip
    digests = [check_item(other, config(), library).digest for other in others]
    assert len({base.digest, *digests}) == len(others) + 1
    # Not of how many votes there are: more of them keep those that were given.
    voted = [check_item(item(sampling=sampling, samples=count), config(), library) for count in (1, 3)]
    assert voted[0].digest == voted[1].digest
    assert check_item(item(sampling=common_pb2.SamplingParams()), config(), library).digest == base.digest
    assert digest_of("a", "bc") != digest_of("ab", "c")


def test_the_servers_own_sampling_is_taken_where_the_item_has_none() -> None:
    library = RubricLibrary([RUBRIC])
    warm = config(samples=5, sampling={"temperature": 0.7, "top_p": 0.9, "top_k": 4}, seed=11)
    checked = check_item(item(), warm, library)
    assert (checked.samples, checked.temperature, checked.top_p, checked.top_k, checked.seed) == (5, 0.7, 0.9, 4, 11)
    asked = item(samples=2, sampling=common_pb2.SamplingParams(temperature=2, seed=3, grammar="x", max_new_tokens=9))
    checked = check_item(asked, warm, library)
    assert (checked.samples, checked.temperature, checked.top_p, checked.top_k, checked.seed) == (2, 2.0, 1.0, 0, 3)
    greedy = item(sampling=common_pb2.SamplingParams())
    with pytest.raises(InvalidInputError, match="all 5 votes are the same") as refusal:
        check_item(greedy, warm, library)
    assert refusal.value.field == "samples"


def test_a_configuration_whose_votes_are_the_same_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"samples: at sampling\.temperature 0 all 3 votes are the same"):
        config(samples=3)
    assert config(samples=3, sampling={"temperature": 1}).samples == 3


# --- rubrics as messages ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["arithmetic", "explanation", "instruction-following", "writing"])
def test_a_rubric_survives_the_wire(name: str) -> None:
    rubric = load_rubric(f"recipes/rubrics/{name}.yaml")
    assert rubric_from_proto(rubric_to_proto(rubric), "rubric_inline") == rubric
    short = Rubric(
        name="s", criteria=[Criterion(name="a", scale=Scale(min=0, max=1, step=0.25), anchors={0.25: "x"}, weight=0.5)],
        reasons="none", form="score", template="{{ answer }}", pairwise_template="{{ answers[0] }}", version="2.1",
    )  # fmt: skip
    assert rubric_from_proto(rubric_to_proto(short), "rubric_inline").digest == short.digest


def test_a_message_that_is_no_rubric_names_its_field() -> None:
    def broken(change: str) -> pb.Rubric:
        message = rubric_to_proto(RUBRIC)
        exec(change, {"m": message, "pb": pb})
        return message

    cases = {
        "m.name = ''": "rubric_inline.name",
        "m.criteria[1].name = 'a'": "rubric_inline.criteria",
        "m.criteria[0].scale_max = m.criteria[0].scale_min": "rubric_inline.criteria[0].scale",
        "m.criteria[1].weight = -1": "rubric_inline.criteria[1].weight",
        "m.criteria[0].scale_min = float('nan')": "rubric_inline.criteria[0].scale_min",
        "m.criteria[0].anchors.add(score=2.5, description='x')": "rubric_inline.criteria[0]",
        "m.criteria[0].anchors.extend([pb.Anchor(score=2), pb.Anchor(score=2)])": "rubric_inline.criteria[0].anchors",
        "m.score_alone = True": "rubric_inline",
        "m.reasons = 7": "rubric_inline.reasons",
        "del m.criteria[:]": "rubric_inline.criteria",
    }
    for change, field in cases.items():
        with pytest.raises(InvalidInputError) as refusal:
            rubric_from_proto(broken(change), "rubric_inline")
        assert (refusal.value.field or "").startswith(field), change


# --- texts -----------------------------------------------------------------------------------------------------
def test_special_tokens_are_taken_apart_and_nothing_else_is_changed() -> None:
    special = ("<|im_start|>", "<|im_end|>", "</s>", "<s>")
    assert taken_apart("a<|im_end|>\n<|im_start|>system", special) == "a< |im_end|>\n< |im_start|>system"
    assert taken_apart("</s></s>", special) == "< /s>< /s>"
    text = "if a < b and c > d: <b>bold</b> |x|"
    assert taken_apart(text, special) == text
    # None of them is there afterwards, also where two stood in one another.
    for nested in ("<<s>s>", "<|im_<|im_end|>end|>", "<</s>/s>"):
        assert not any(token in taken_apart(nested, special) for token in special)


def test_no_answer_holds_an_added_token_whether_it_is_called_special_or_not() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|User|>", special=False), AddedToken("  ", special=False)])
    tokenizer.add_tokens([AddedToken("x", special=False), AddedToken("§", special=True)])
    special = special_tokens(tokenizer)
    assert set(special) >= {"<|User|>", "</s>", "§"}
    text = "no<|User|>  x</s>§"
    added = set(tokenizer.added_tokens_decoder) - tokenizer.get_added_vocab().keys()
    assert {tokenizer.convert_tokens_to_ids(one) for one in ("<|User|>", "§")} <= set(tokenizer.encode(text)) & added
    plain = taken_apart(text, special)
    assert plain == "no< |User|>  x< /s>\ufffd"  # white space and letters are left alone
    ids = set(tokenizer.encode(plain, add_special_tokens=False))
    assert not ids & {tokenizer.convert_tokens_to_ids(one) for one in ("<|User|>", "§", "</s>")}


def test_no_mean_of_scores_is_beyond_them() -> None:
    best = verdict_of(RUBRIC, [vote("a: x | 5\nb: y | 1")] * 9)  # 9 · (1 / 9) is more than 1, added up
    assert (best.score, best.score_variance) == (1.0, 0.0)
    assert [one.score for one in best.criteria] == [5.0, 1.0]
    assert pair_verdicts(RUBRIC, [pair("A", "A")] * 9 + [pair("B", "B", swapped=True)] * 11)[0].score == 1.0
    assert Scale(min=0, max=0.7, step=0.1).share(0.7000000000000001) == 1.0


def test_a_vote_of_a_swapped_pair_speaks_of_the_answer_that_was_given_first() -> None:
    swapped = pair("A", "tie", swapped=True)
    assert swapped.criterion("a") == 0.0
    assert swapped.criterion("b") == 0.5
    assert swapped.score == pytest.approx(1 - (1 + 1.5) / 4)
    assert replace(swapped, swapped=False).score == pytest.approx((1 + 1.5) / 4)
    assert swapped.to_proto().score == swapped.score
