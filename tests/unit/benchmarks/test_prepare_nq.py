"""The study's corpus and questions, made of a handful of articles and passages."""

import importlib.util
import json
import lzma
import sys
from pathlib import Path

import pytest

from realm_retro.data.questions import load_questions
from realm_retro.errors import UserError

PROGRAMS = Path(__file__).parents[2] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, PROGRAMS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the second one imports the first
    spec.loader.exec_module(module)
    return module


load("prepare_wiki2019")
nq = load("prepare_nq")

GOLD = [
    {"question": "who", "answers": ["Ann"], "title": "T", "passage": "Ann did."},
    {"question": "when", "answers": ["1999"], "title": "Title 1", "passage": "1999."},
    {"question": "by whom", "answers": ["Ann"], "title": "T", "passage": "Ann did."},
]
TRAIN = [
    {"question": "where", "answers": ["Rome"], "more": 1},
    {"question": "When?", "answers": ["2000"]},
    {"question": "how", "answers": ["so", "thus"]},
]


def write(path, records):
    opener = lzma.open if path.suffix == ".xz" else open
    path.parent.mkdir(exist_ok=True)
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def sources(tmp_path):
    articles = [
        {"id": f"{i:02x}", "title": f"Title {i}", "sections": [["", [f"Lead {i}."]]]}
        for i in range(5)
    ]
    return {
        "articles": write(tmp_path / "wiki.jsonl.xz", articles),
        "gold": write(tmp_path / "gold" / "open.jsonl.xz", GOLD).parent,
        "questions": write(tmp_path / "train.jsonl", TRAIN),
        "output": tmp_path / "new" / "nq",
    }


def test_corpus_and_questions(sources):
    counts = nq.prepare(**sources, count=5, seed=0)
    assert list(counts.values()) == [5, 35, 1, 3, 2, 2, 1]
    output = sources["output"]
    assert sorted(path.name for path in output.iterdir()) == [
        "corpus.jsonl",
        "gold.jsonl",
        "train.jsonl",
    ]
    corpus = read(output / "corpus.jsonl")
    assert [record["id"] for record in corpus[:5]] == ["00", "01", "02", "03", "04"]
    assert corpus[5:] == [
        {"id": "gold-passage-00000", "title": "T", "text": "Ann did."},
        {"id": "gold-passage-00001", "title": "Title 1", "text": "1999."},
    ]
    gold = load_questions(output / "gold.jsonl")
    assert [question.question for question in gold] == ["who", "when", "by whom"]
    assert [int(question.document[-1]) for question in gold] == [0, 1, 0]
    assert gold[1].answers == ("1999",)
    assert read(output / "train.jsonl") == [
        {"id": "train-00000", "question": "where", "answers": ["Rome"]},
        {"id": "train-00002", "question": "how", "answers": ["so", "thus"]},
    ]


def test_a_seed_draws_the_same_articles(sources):
    output = sources["output"]
    drawn = {}
    for seed in (0, 1, 0):
        nq.prepare(**sources, count=2, seed=seed)
        text = (output / "corpus.jsonl").read_text()
        assert drawn.setdefault(seed, text) == text
    assert drawn[0] != drawn[1]


def test_a_file_of_gold_passages(sources):
    sources["gold"] = write(sources["output"].parents[1] / "some.jsonl", GOLD[:1])
    assert nq.prepare(**sources, count=1, seed=0)["gold questions"] == 1


def test_a_wrong_line_is_named(sources, tmp_path):
    broken = write(tmp_path / "b.jsonl", [GOLD[0], {"question": "who", "answers": []}])
    with pytest.raises(UserError, match=r"b\.jsonl:2: has no answers, title, passage$"):
        nq.prepare(**{**sources, "gold": broken}, count=1, seed=0)
    broken.write_text("{\n")
    with pytest.raises(UserError, match=r"b\.jsonl:1: is not JSON"):
        nq.prepare(**{**sources, "questions": broken}, count=1, seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no file"):
        nq.prepare(**{**sources, "gold": tmp_path / "empty"}, count=1, seed=0)
    assert not sources["output"].exists()
