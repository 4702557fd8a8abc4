r"""Measures question answering: recall of the retriever, and the reader's answers.

Reads:   WORKDIR/passages, WORKDIR/runs/NAME/checkpoints, the questions that config.qa
         holds out, or those of --questions
Writes:  WORKDIR/runs/NAME/evaluation_qa.json     recall@k, exact match, F1 and regex
         match with 95 % intervals over questions
         WORKDIR/runs/NAME/predictions_qa.jsonl   each answer with its evidence
         WORKDIR/answers, WORKDIR/indexes         made where they are not there yet

  python -m realm_retro.cli.evaluate_qa --config=configs/realm/quickstart.py:finetune \
      --workdir=/tmp/realm

Beside the run stand in the same table the retriever that it started from (zero-shot)
and BM25 on the same passages. Before there is a run, these two are measured alone. A
run of pre-training has no reader: its retriever is measured. Where questions name their
gold document (field ``document``), the share of them that find it is told as well.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from absl import flags
from etils import epath

from realm_retro import disk, progress
from realm_retro.cli import common, find_answers, qa_setup, towers
from realm_retro.cli.qa_setup import Weights
from realm_retro.data.answer_store import AnswerStore
from realm_retro.data.passages import PassageStore
from realm_retro.data.questions import Question
from realm_retro.errors import UserError
from realm_retro.realm import evaluation, question_sets
from realm_retro.realm.answer import Answerer
from realm_retro.realm.evidence import Answer, Retrieved, Seconds
from realm_retro.realm.question_sets import QaConfig
from realm_retro.retrieval.bm25 import Bm25
from realm_retro.retrieval.index.base import MISSING_ID
from realm_retro.text import answers as answers_lib
from realm_retro.typing import Config, HostArray, JsonDict

QUESTIONS = flags.DEFINE_string(
    "questions", None, "Questions in place of those that config.qa holds out."
)
REPORT, PREDICTIONS = "evaluation_qa.json", "predictions_qa.jsonl"

_FORMAT_VERSION = 1
# Questions that are searched for at a time.
_GROUP = 64


@dataclasses.dataclass(frozen=True)
class Test:
    """What every retriever is measured on.

    Attributes:
      questions: to be answered.
      answers: the passages that answer each.
      gold: int64 [questions], the gold document of each; see `evaluation.gold_rows`.
      store: the passages.
      settings: of the config.
    """

    questions: Sequence[Question]
    answers: AnswerStore
    gold: HostArray
    store: PassageStore
    settings: QaConfig

    def recalls(self, ids: HostArray) -> JsonDict:
        """``recall`` and, where gold documents are known, ``gold_recall`` at each k.

        Args:
          ids: int64 [questions, found], passages, best first; −1 where there are fewer.
        """
        has = self.answers.has(np.arange(len(ids)), ids)
        measures = {"recall": lambda k: evaluation.recall(has, k)}
        if (self.gold >= 0).any():
            there = ids != MISSING_ID
            documents = np.where(
                there, self.store.document[np.where(there, ids, 0)], -1
            )
            measures["gold_recall"] = lambda k: evaluation.gold_recall(
                documents, self.gold, k
            )
        return {
            name: {str(k): evaluation.interval(of(k)) for k in self.settings.recall_at}
            for name, of in measures.items()
        }


def main(config: Config, workdir: epath.Path) -> None:
    """Evaluates the newest checkpoint of a run; see the module docstring."""
    started = time.perf_counter()
    settings = qa_setup.qa_config(config)
    store = towers.open_store(config, workdir)
    questions = (
        question_sets.load(QUESTIONS.value, settings)
        if QUESTIONS.value
        else question_sets.test_questions(settings)
    )
    test = Test(
        questions,
        find_answers.find(workdir, questions, store),
        _gold(questions, store),
        store,
        settings,
    )
    run_dir = qa_setup.run_folder(config, workdir)
    run_dir.mkdir(parents=True, exist_ok=True)
    trained = qa_setup.trained_weights(config, workdir)
    rows, most = [], _most(test)
    if trained is not None:
        answerer = qa_setup.open_answerer(config, workdir, trained, store, k=most)
        row, found = _run(str(config.name), answerer, test, run_dir)
        by_index = qa_setup.index_recall(
            config, workdir, trained, found, answerer.index
        )
        rows.append({**row, "index": by_index})
    start = _start(config, workdir, trained)
    if start is not None:
        answerer = qa_setup.open_answerer(config, workdir, start, store, k=most)
        found = _retrieve(answerer, test, "zero-shot")
        by_index = qa_setup.index_recall(config, workdir, start, found, answerer.index)
        row = {"label": "zero-shot", **test.recalls(found.ids)}
        rows.append({**row, "index": by_index})
    if settings.bm25:
        rows += _bm25(store, test)
    report = {
        "format_version": _FORMAT_VERSION,
        "questions": len(questions),
        "source": QUESTIONS.value or settings.test or settings.questions,
        "answerable": int((test.answers.counts > 0).sum()),
        "passages": len(store),
        "read": settings.read,
        "step": trained.step if trained else None,
        "results": rows,
        "seconds": time.perf_counter() - started,
    }
    _write(run_dir / REPORT, [json.dumps(report, indent=1, ensure_ascii=False)])
    for line in table(report):
        common.say(line)
    common.say(f"evaluate_qa: written to {run_dir}")


def _gold(questions: Sequence[Question], store: PassageStore) -> HostArray:
    """The gold document of each question, as far as one is named."""
    ids = (store.document_id(row) for row in range(store.num_documents))
    gold = evaluation.gold_rows(questions, ids)
    if lost := int((gold == evaluation.GOLD_ELSEWHERE).sum()):
        done = "count as not found" if (gold >= 0).any() else "gold recall is left out"
        common.say(
            f"evaluate_qa: {lost:,} questions name a document that the corpus does not"
            f" have (its ids come from config.corpus.id_field): {done}"
        )
    return gold


def _run(
    label: str, answerer: Answerer, test: Test, run_dir: epath.Path
) -> tuple[JsonDict, Retrieved]:
    """Recall of a run's retriever and, if it has a reader, scores of its answers.

    Returns:
      These, and the passages that were found.
    """
    texts = [question.question for question in test.questions]
    # Compiles, so that the times below are those of the work.
    first = texts[:_GROUP]
    next(answerer.read(first, answerer.retrieve(first, _most(test))))
    found = _retrieve(answerer, test, label)
    row: JsonDict = {"label": label, **test.recalls(found.ids)}
    if cut := int(found.cut.sum()):
        common.say(
            f"evaluate_qa: {cut} questions are longer than config.model.query_length="
            f"{answerer.config.query_length} wordpieces and were cut"
        )
    given: list[Answer] = []
    with progress.bar(total=len(texts), unit="questions", label=f"{label} read") as bar:
        for part in answerer.read(texts, found):
            given += part
            bar.update(len(part))
    seconds = Seconds.sum([answer.seconds for answer in given]) * (1 / len(given))
    row["seconds_per_question"] = dataclasses.asdict(seconds)
    if answerer.reads:
        predictions = [answer.text or "" for answer in given]
        scored = evaluation.scores(predictions, test.questions)
        row |= {name: evaluation.interval(values) for name, values in scored.items()}
    lines = _predictions(given, test)
    _write(run_dir / PREDICTIONS, (json.dumps(x, ensure_ascii=False) for x in lines))
    return row, found


def _predictions(given: Sequence[Answer], test: Test) -> Iterator[JsonDict]:
    for number, (answer, question) in enumerate(
        zip(given, test.questions, strict=True)
    ):
        rows = np.array([[passage.row for passage in answer.passages]], np.int64)
        has = test.answers.has([number], rows)[0]
        record = {**dataclasses.asdict(question), **answer.as_json()}
        record["prediction"] = record.pop("text")
        record["correct"] = answer.text is not None and answers_lib.is_correct(
            answer.text, question.answers, question.is_regex
        )
        for passage, found in zip(record["passages"], has.tolist(), strict=True):
            passage["has_answer"] = found
        yield record


def _retrieve(answerer: Answerer, test: Test, label: str) -> Retrieved:
    """The best passages of all questions."""
    texts = [question.question for question in test.questions]
    parts = []
    with progress.bar(total=len(texts), unit="questions", label=label) as bar:
        for start in range(0, len(texts), _GROUP):
            parts.append(answerer.retrieve(texts[start : start + _GROUP], _most(test)))
            bar.update(len(parts[-1].ids))
    return Retrieved.join(parts)


def _most(test: Test) -> int:
    """How many passages recall and the reader want."""
    return max(*test.settings.recall_at, test.settings.read)


def _start(
    config: Config, workdir: epath.Path, trained: Weights | None
) -> Weights | None:
    """The weights that the run started from, unless their index is a work of its own.

    Beside a run they are a second opinion: what is missing for them stops nothing.
    """
    try:
        start = qa_setup.start_weights(config, workdir)
    except UserError as error:
        if trained is None:
            raise
        common.say(f"evaluate_qa: zero-shot is left out: {error}")
        return None
    folder = qa_setup.index_folder(workdir, start)
    if trained is not None and not folder.exists():
        common.say(
            "evaluate_qa: zero-shot is left out, there is no index of the weights that"
            f" the run started from ({folder})"
        )
        return None
    return start


def _bm25(store: PassageStore, test: Test) -> list[JsonDict]:
    """One row, or none where the package is not installed."""
    texts: list[str] = []
    found: list[HostArray] = []
    try:
        total = len(store) + len(test.questions)
        with progress.bar(total=total, unit="texts", label="BM25") as bar:
            for start in range(0, len(store), 4096):
                rows = range(start, min(start + 4096, len(store)))
                bodies = store.texts(rows)
                texts += [
                    f"{store.title(row)}\n{body}"
                    for row, body in zip(rows, bodies, strict=True)
                ]
                bar.update(len(rows))
            index = Bm25.build(texts)
            asked = [question.question for question in test.questions]
            for start in range(0, len(asked), _GROUP):
                group = asked[start : start + _GROUP]
                found.append(index.search(group, max(test.settings.recall_at)).ids)
                bar.update(len(group))
    except UserError as error:
        common.say(f"evaluate_qa: BM25 is left out: {error}")
        return []
    return [{"label": "BM25", **test.recalls(np.concatenate(found))}]


def table(report: JsonDict) -> Iterator[str]:
    """An evaluation as lines of text, in percent with 95 % intervals."""
    step = "no run" if report["step"] is None else f"checkpoint {report['step']}"
    yield (
        f"{report['questions']:,} questions, {report['answerable']:,} with an answer in"
        f" {report['passages']:,} passages, {step}; % [95 % interval over questions]"
    )
    first = report["results"][0]
    columns: dict[str, tuple[str, ...]] = {
        f"recall@{k}": ("recall", k) for k in first["recall"]
    }
    columns |= {
        name.replace("_", " "): (name,)
        for name in evaluation.MEASURES
        if any(row.get(name) for row in report["results"])
    }
    yield from _lines(report["results"], "", columns)
    if gold := first.get("gold_recall"):
        columns = {f"recall@{k}": ("gold_recall", k) for k in gold}
        asked = next(iter(gold.values()))["questions"]
        title = f"gold document, {asked:,} questions"
        yield from _lines(report["results"], title, columns)
    for row in report["results"]:
        index = row.get("index")
        if index and index["backend"] != "exact":
            yield (
                f"  {row['label']}: searched with {index['backend']}, which finds"
                f" {index['recall']:.1%} of the {index['k']} passages that exact search"
                f" finds ({index['queries']:,} questions)"
            )


def _lines(
    rows: Sequence[JsonDict], title: str, columns: dict[str, tuple[str, ...]]
) -> Iterator[str]:
    """A head and one line a row; a column is the path of an interval in a row."""
    cells = [[title, *columns]]
    for row in rows:
        values = [row["label"]]
        for path in columns.values():
            value = row.get(path[0])
            values.append(_cell(value[path[1]] if value and path[1:] else value))
        cells.append(values)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join(["", first, *rest])


def _cell(value: JsonDict | None) -> str:
    if value is None:
        return "–"
    low, high = (100 * value[name] for name in ("low", "high"))
    return f"{100 * value['value']:.1f} [{low:.1f}, {high:.1f}]"


def _write(path: epath.Path, lines: Iterable[str]) -> None:
    with disk.replacing(path) as temporary, temporary.open("w") as file:
        for line in lines:
            file.write(f"{line}\n")


def entry() -> None:
    """The console script."""
    common.run(main, name="evaluate_qa")


if __name__ == "__main__":
    entry()
