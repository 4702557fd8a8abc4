"""Questions from files and TFDS; what is wrong is said in one line with its place."""

import gzip
import json
import lzma

import pytest
import tensorflow_datasets as tfds

from realm_retro.data.questions import Question, fingerprint, load_questions
from realm_retro.errors import UserError

OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}
GOOD = {"question": "who wrote emma", "answers": ["Jane Austen"]}


def write(path, *rows, opener=open):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    with opener(path, "wb") as file:
        file.write("\n".join(lines).encode())
    return path


def one(tmp_path, **row):
    [question] = load_questions(write(tmp_path / "q.jsonl", {"question": "q?", **row}))
    return question


def refusal(source, **settings):
    with pytest.raises(UserError) as error:
        load_questions(source, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("compression", list(OPENERS))
def test_files(tmp_path, compression):
    regex = {"id": 7, "question": "When?", "answer_regex": "(August )?1977", "x": []}
    path = tmp_path / f"q.jsonl{compression}"
    write(path, GOOD, "", regex, "  ", opener=OPENERS[compression])
    assert load_questions(str(path)) == [
        Question(f"{path.name}:1", "who wrote emma", ("Jane Austen",), is_regex=False),
        Question("7", "When?", ("(August )?1977",), is_regex=True),
    ]


def test_a_byte_order_mark(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert load_questions(path)[0].answers == ("Jane Austen",)


def test_forms_of_answers(tmp_path):
    assert one(tmp_path, answers=["b", "a", "b"]).answers == ("b", "a")
    assert one(tmp_path, answers="a").answers == ("a",)
    assert one(tmp_path, answer=["a"]).answers == ("a",)
    assert one(tmp_path, answers=[["a", "b"], ["c"]]).answers == ("a", "b", "c")
    squad = {"text": ["a", "b"], "answer_start": [3, 4]}
    assert one(tmp_path, answers=squad).answers == ("a", "b")
    trivia = {"value": "v", "aliases": ["a"], "normalized_value": "n"}
    assert one(tmp_path, answer=trivia).answers == ("v", "a")
    pointed = one(tmp_path, answers=[1], candidates=["no", "yes"])
    assert pointed.answers == ("yes",)
    both = one(tmp_path, answer_regex=["a+", "b"])
    assert (both.answers, both.is_regex) == (("a+", "b"), True)
    assert one(tmp_path, answers=["a"], answer_regex=None).answers == ("a",)
    assert one(tmp_path, answers=["a"], question_id="x").id == "x"


def test_a_gold_document(tmp_path):
    assert one(tmp_path, answers=["a"]).document == ""
    assert one(tmp_path, answers=["a"], document=None).document == ""
    assert one(tmp_path, answers=["a"], document="emma-1").document == "emma-1"
    assert one(tmp_path, answers=["a"], document=7).document == "7"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q"}, "has no answers"),
        ({"question": "q", "answers": None}, "has no answers"),
        ({"question": "q", "answers": []}, "holds no answer"),
        ({"question": "q", "answers": [[]]}, "holds no answer"),
        ({"question": "q", "answers": ["a", " "]}, "an empty answer"),
        ({"question": "q", "answers": [1.5]}, "holds 1.5"),
        ({"question": "q", "answers": [True]}, "holds True"),
        ({"question": "q", "answers": {"x": 1}}, "holds {'x': 1}"),
        ({"question": "q", "answers": [3]}, "3, which is no place in 'candidates'"),
        ({"question": "q", "answers": [2], "candidates": ["a"]}, "holds 2"),
        ({"question": "q", "answers": [-1], "candidates": ["a"]}, "holds -1"),
        ({"question": "q", "answer_regex": "(a"}, "'(a' does not compile (missing )"),
        ({"question": "q", "answer_regex": ["a", "*"]}, "'*' does not compile"),
        ({"question": "q", "answer_regex": "a?"}, "accepts every answer"),
        ({"question": "q", "answer_regex": 5}, "holds 5"),
        ({"question": "q", "answers": ["a"], "answer_regex": "a"}, "has both answers"),
        ({"question": "", "answers": ["a"]}, "'question' is ''"),
        ({"query": "q", "answers": ["a"]}, "has the fields: query, answers"),
        ({"question": "q", "answers": ["\ud800"]}, "half of a surrogate pair"),
        ({"id": [], "question": "q", "answers": ["a"]}, "'id' is []"),
        ({**GOOD, "document": {"id": 1}}, "'document' is {'id': 1}"),
        ({**GOOD, "document": True}, "'document' is True"),
        ({**GOOD, "document": "\ud800"}, "half of a surrogate pair"),
        ("{", "is not JSON"),
        ("[1]", "is a JSON list"),
        ("[" * 100_000, "is not JSON"),
        ("\x00", "is not JSON"),
    ],
    ids=str,
)
def test_a_wrong_line_is_named(tmp_path, row, said):
    message = refusal(write(tmp_path / "q.jsonl", GOOD, row, GOOD))
    assert message.startswith(f"{tmp_path}/q.jsonl:2: ")
    assert said in message
    assert len(message) < 300 + len(str(tmp_path))


def test_ids_are_unique(tmp_path):
    path = write(tmp_path / "q.jsonl", {**GOOD, "id": 1}, {**GOOD, "id": "1"})
    assert f"{path}:2: has the id '1' of {path}:1" in refusal(path)


def test_a_file_that_cannot_be_read(tmp_path):
    assert "does not exist" in refusal(tmp_path / "no.jsonl")
    assert "is a folder" in refusal(tmp_path)
    empty = write(tmp_path / "empty.jsonl", "", "")
    assert "holds no question" in refusal(empty)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(GOOD).encode() + b'\n{"question": "\xe9"}')
    assert f"{latin}:2: is not UTF-8" in refusal(latin)
    for suffix, opener in [(".gz", gzip.open), (".xz", lzma.open)]:
        path = write(tmp_path / f"q.jsonl{suffix}", GOOD, opener=opener)
        path.write_bytes(path.read_bytes()[:-9])
        assert "is damaged or cut short" in refusal(path)
        path.write_text("plain")
        assert "is damaged or cut short" in refusal(path)


def test_the_fingerprint_is_of_the_content(tmp_path):
    one, two = {**GOOD, "id": "x"}, {**GOOD, "id": "y"}
    first = load_questions(write(tmp_path / "a.jsonl", one, two))
    again = load_questions(write(tmp_path / "b.jsonl", "", one, two))
    other = load_questions(write(tmp_path / "c.jsonl", one, {**two, "answers": ["z"]}))
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)
    gold = load_questions(write(tmp_path / "d.jsonl", {**one, "document": "e"}, two))
    assert fingerprint(first) == fingerprint(gold)
    assert fingerprint(first) != fingerprint(first[::-1])


class LikeTriviaQa(tfds.core.GeneratorBasedBuilder):
    """A dataset with TriviaQA's nested answers."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        answer = {"value": text, "aliases": tfds.features.Sequence(text)}
        features = {"question": text, "question_id": text, "answer": answer}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples("t"),
            "validation": self._generate_examples("v"),
        }

    def _generate_examples(self, split):
        for i in range(3):
            answer = {"value": f"é{i}", "aliases": [f"a{i}", "b"]}
            yield (
                i,
                {"question": f"q{i}", "question_id": f"{split}{i}", "answer": answer},
            )


class LikeNaturalQuestionsOpen(tfds.core.GeneratorBasedBuilder):
    """A dataset with a list of answers and no id."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        features = {"question": text, "answer": tfds.features.Sequence(text)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"question": "q", "answer": ["a", "b"]}


def test_tfds_datasets(tmp_path):
    data_dir = str(tmp_path)
    found = load_questions("tfds:like_trivia_qa:validation", data_dir=data_dir)
    assert sorted(found, key=lambda q: q.id) == [
        Question(f"v{i}", f"q{i}", (f"é{i}", f"a{i}", "b")) for i in range(3)
    ]
    [question] = load_questions("tfds:like_natural_questions_open", data_dir=data_dir)
    assert question.answers == ("a", "b")
    assert question.id == "like_natural_questions_open:train[0]"
    assert "has no split 'test'" in refusal(
        "tfds:like_trivia_qa:test", data_dir=data_dir
    )
    assert "is not known" in refusal("tfds:no_such_dataset:train", data_dir=data_dir)
    assert "names no dataset" in refusal("tfds::train")
