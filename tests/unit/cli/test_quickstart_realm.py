"""The last page of REALM's half says what was measured, and no more."""

import json

import pytest
from etils import epath

from realm_retro.cli import quickstart_realm
from realm_retro.cli.quickstart_stages import Stage
from realm_retro.errors import UserError


def value(mean):
    return {"value": mean, "low": mean - 0.1, "high": mean + 0.1, "questions": 101}


def row(label, at_5, **scores):
    recall = {"1": value(0.25), "5": value(at_5), "20": value(0.75), "100": value(0.85)}
    return {"label": label, "recall": recall, **scores}


START = {"results": [row("zero-shot", 0.5)]}
TRAINED = {
    "questions": 101,
    "answerable": 99,
    "passages": 2345,
    "step": 120,
    "results": [
        row("qa", 0.65, exact_match=value(0.125), f1=value(0.25), regex_match=None),
        row("zero-shot", 0.55),
        row("BM25", 0.6),
    ],
}
METRICS = [
    {
        "step": 5 * i,
        "loss": 10.0 - i,
        "mlm": 3.0 - i / 10,
        "null_mlm": 3.5,
        "index_step": index,
        "staleness": 2.0 * i,
    }
    for i, index in enumerate([0.0, 0.0, 8.0, 20.0], start=1)
]
ANSWER = {
    "question": "Who was put in command in 1775?",
    "text": "George Washington",
    "probability": 0.625,
    "passages": [
        {
            "row": 7,
            "document": "american_revolution",
            "title": "American Revolution",
            "text": "The army was " + 60 * "very " + "led by George Washington. " * 2,
            "score": 12.5,
            "probability": 0.75,
            "span": [320, 337],
        },
        {
            "row": 8,
            "document": "only_an_id",
            "title": "",
            "text": "Nothing\nof the kind.",
            "score": 10.5,
            "probability": 0.125,
            "span": None,
        },
        {"title": "Third", "probability": 0.1, "text": "is left out", "span": None},
    ],
    "null_mass": 0.1,
    "seconds": {"tokenise": 0.001},
    "cut": False,
}
PREDICTION = {
    "question": ANSWER["question"],
    "answers": ["George Washington", "Washington"],
    "is_regex": False,
    "correct": True,
}
STAGES = {
    "train": {
        "seconds": 120.0,
        "peak_mb": 1500,
        "companion": {"name": "refresh_index", "peak_mb": 700},
    },
    "ask:finetune": {"seconds": 12.5, "peak_mb": 800},
}


@pytest.fixture
def finished(tmp_path):
    """A workdir as the stages leave it; returns what `page` is called with."""
    manifests = {
        "corpus": {"attribution": "Text: by many, CC BY-SA 4.0"},
        "passages": {"passages": 2345},
    }
    for name, meta in manifests.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"meta": meta}))
    for name in ("realm", "zero_shot", "qa"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    runs = tmp_path / "runs"
    (runs / "realm" / "metrics.jsonl").write_text("\n".join(map(json.dumps, METRICS)))
    (runs / "zero_shot" / "evaluation_qa.json").write_text(json.dumps(START))
    (runs / "qa" / "evaluation_qa.json").write_text(json.dumps(TRAINED))
    (runs / "qa" / "predictions_qa.jsonl").write_text(json.dumps(PREDICTION))
    (runs / "qa" / "answers.jsonl").write_text(json.dumps(ANSWER))
    road = [
        Stage("train", "runs/realm/manifest.json"),
        Stage("evaluate_qa", "runs/zero_shot/evaluation_qa.json", "zero_shot"),
        Stage("train", "runs/qa/manifest.json", "finetune"),
        Stage("evaluate_qa", "runs/qa/evaluation_qa.json", "finetune"),
        Stage("ask", "runs/qa/answers.jsonl", "finetune"),
    ]
    return epath.Path(tmp_path), road, STAGES


def lines_of(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_page_says_what_was_measured(finished):
    page = quickstart_realm.page(*finished)
    lines = lines_of(page)
    assert (
        "Pre-training: 20 steps over 2,345 passages, −log p(y|x) 9.000 → 6.000" in lines
    )
    assert (
        "Masked words: −log p 2.600 with what is retrieved, 3.500 with the null"
        " document alone"
    ) in lines
    assert (
        "Index: that of step 0 at first, of step 20 at last, 5 steps old on average"
    ) in lines
    assert (
        "Held-out questions: 101, of which 99 have an answer in 2,345 passages" in lines
    )
    assert "recall@1 recall@5 recall@20 exact match F1" in lines
    recall = "25.0 (15…35) {} 75.0 (65…85)"
    assert f"before training {recall.format('50.0 (40…60)')} – –" in lines
    assert f"pre-trained {recall.format('55.0 (45…65)')} – –" in lines
    scores = "12.5 (2…22) 25.0 (15…35)"
    assert f"fine-tuned {recall.format('65.0 (55…75)')} {scores}" in lines
    assert f"BM25 {recall.format('60.0 (50…70)')} – –" in lines
    assert "beside it refresh_index 700" in lines
    assert "all 132.5 2200" in lines
    assert "Text: by many, CC BY-SA 4.0" in lines
    assert max(map(len, page.splitlines())) <= 88


def test_answers_are_shown_with_their_evidence(finished):
    page = quickstart_realm.page(*finished)
    flat = " ".join(page.split())
    assert "▸ George Washington (p = 0.62), right" in flat
    assert "· American Revolution (p(z|x) = 0.75)" in flat
    assert "led by [[George Washington]]." in flat
    assert "· only_an_id (p(z|x) = 0.12) Nothing of the kind." in flat
    assert "Third" not in page


def test_a_wrong_answer_is_said_to_be_wrong():
    wrong = {**PREDICTION, "correct": False}
    text = quickstart_realm.answers([ANSWER], [wrong])
    assert "wanted: George Washington | Washington" in " ".join(text.split())
    assert "right" not in text


def test_without_questions_the_page_says_how_to_bring_some(finished):
    workdir, road, stages = finished
    page = " ".join(quickstart_realm.page(workdir, road[:1], stages).split())
    assert "--config.qa.questions=FILE.jsonl" in page
    assert "recall@" not in page


def test_what_was_left_out_is_left_out(finished):
    workdir, road, stages = finished
    results = [one for one in TRAINED["results"] if one["label"] == "qa"]
    path = workdir / "runs" / "qa" / "evaluation_qa.json"
    path.write_text(json.dumps({**TRAINED, "results": results}))
    page = quickstart_realm.page(workdir, road, stages)
    assert "fine-tuned" in page
    assert "BM25" not in page
    assert "pre-trained" not in page


def test_an_index_that_stayed_is_said_to_have(finished):
    workdir, road, stages = finished
    path = workdir / "runs" / "realm" / "metrics.jsonl"
    path.write_text(json.dumps(METRICS[0]))
    page = quickstart_realm.page(workdir, road, stages)
    assert "Index: that of step 0, never refreshed" in page


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/qa/answers.jsonl", "is empty"),
        ("runs/realm/metrics.jsonl", "is empty"),
        ("runs/qa/evaluation_qa.json", "cannot be read"),
        ("passages/manifest.json", "cannot be read"),
    ],
)
def test_a_damaged_result_is_one_line(finished, name, said):
    (finished[0] / name).write_text("")
    with pytest.raises(UserError, match=f"{name}: {said}.*delete it") as error:
        quickstart_realm.page(*finished)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("start", [0, 5, 150, 380])
def test_a_cut_passage_holds_its_answer(start):
    text = "".join(chr(ord("a") + i % 26) for i in range(400))
    shown = quickstart_realm.marked(text, [start, start + 10], most=100)
    assert f"[[{text[start : start + 10]}]]" in shown
    assert len(shown.strip("…")) == 104
    assert shown.startswith("…") == (start > 60)
    assert shown.endswith("…") == (start < 330)
