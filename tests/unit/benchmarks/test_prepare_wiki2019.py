"""The wiki2019 converter on a handful of articles."""

import importlib.util
import json
import lzma
from pathlib import Path

import pytest

from realm_retro.errors import UserError

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "prepare_wiki2019.py"
SPEC = importlib.util.spec_from_file_location(PROGRAM.stem, PROGRAM)
wiki = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(wiki)


def articles(count):
    return [
        {
            "id": f"{i:02x}",
            "title": f"Title {i}",
            "categories": ["any"],
            "sections": [["", [f"Lead {i}.", "Ünï\u2028code."]], ["History", ["Old."]]],
        }
        for i in range(count)
    ]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "articles.jsonl.xz"
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(article) + "\n" for article in articles(9))
    return path


def written(path):
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("name", ["new/wiki.jsonl", "wiki.jsonl.xz"])
def test_all_articles_in_order(source, tmp_path, name):
    sizes = wiki.convert(source, tmp_path / name)
    records = written(tmp_path / name)
    assert [r["id"] for r in records] == [a["id"] for a in articles(9)]
    assert records[3] == {
        "id": "03",
        "title": "Title 3",
        "text": "Lead 3.\nÜnï\u2028code.\nHistory\nOld.",
    }
    assert sizes == [len(r["text"].encode()) for r in records]
    assert list((tmp_path / name).parent.glob(".partial-*")) == []


def test_first_and_sampled_articles(source, tmp_path):
    target = tmp_path / "wiki.jsonl"
    wiki.convert(source, target, articles=4)
    assert [r["id"] for r in written(target)] == ["00", "01", "02", "03"]
    wiki.convert(source, target, articles=4, seed=1)
    sampled = [r["id"] for r in written(target)]
    assert len(sampled) == 4
    assert sampled == sorted(sampled) != ["00", "01", "02", "03"]
    wiki.convert(source, target, articles=4, seed=1)
    assert [r["id"] for r in written(target)] == sampled


def test_refuses_too_few_articles_and_other_records(source, tmp_path):
    target = tmp_path / "wiki.jsonl"
    with pytest.raises(UserError, match="has 9 articles, cannot take 10"):
        wiki.convert(source, target, articles=10)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(articles(1)[0]) + '\n{"id": "1"}\n')
    with pytest.raises(UserError, match=r"broken\.jsonl:2: is not an article"):
        wiki.convert(broken, target)
    assert not target.exists()
