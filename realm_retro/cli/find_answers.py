r"""Finds which passages have an answer to each question of config.qa: once, for all.

Training and evaluation do the same when they need it; run ahead, it does not hold them
up.

Reads   WORKDIR/passages, the questions of config.qa
Writes  WORKDIR/answers/FINGERPRINT  the passages of each question, for each set of
        questions

  python -m realm_retro.cli.find_answers --config=configs/realm/quickstart.py \
      --workdir=/tmp/realm

An interrupted run resumes at the first missing shard.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from etils import epath

from realm_retro import config as config_lib
from realm_retro.cli import common
from realm_retro.data import answer_store
from realm_retro.data import questions as questions_lib
from realm_retro.data.answer_store import AnswerStore
from realm_retro.data.passages import PassageStore
from realm_retro.data.questions import Question
from realm_retro.parallel import hosts
from realm_retro.realm import question_sets
from realm_retro.realm.question_sets import QaConfig
from realm_retro.typing import Config, JsonDict

FOLDER = "answers"


def main(config: Config, workdir: epath.Path) -> None:
    """Runs the stage; see the module docstring."""
    section = config_lib.section(config, "qa")
    settings = config_lib.build(QaConfig, section, name="config.qa")
    store = PassageStore.open(workdir / "passages")
    find(workdir, question_sets.training_questions(settings), store)
    if settings.test or settings.holdout:
        find(workdir, question_sets.test_questions(settings), store)


def find(
    workdir: epath.Path, questions: Sequence[Question], store: PassageStore
) -> AnswerStore:
    """The answer store of some questions, made if it is not there yet.

    Raises:
      UserError: it is damaged, or of other passages.
    """
    fingerprint = questions_lib.fingerprint(questions)
    directory = workdir / FOLDER / fingerprint[:16]
    # One process writes; the others wait, and read.
    if hosts.is_main():
        _build(directory, questions, store)
    hosts.barrier(f"answers {fingerprint[:16]}")
    parents = {"passages": store.fingerprint}
    return AnswerStore.open(directory, questions=questions, parents=parents)


def _build(
    directory: epath.Path, questions: Sequence[Question], store: PassageStore
) -> None:
    stage = answer_store.open_stage(directory, questions, store)
    if stage.finished:
        return
    # Said aloud, the tokenizer's threads do not warn when something forks later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    started = time.monotonic()
    counts = answer_store.build(questions, store, stage)
    seconds = time.monotonic() - started
    stage.commit({**counts, "seconds": round(seconds, 2)})
    _report(counts, len(questions), seconds)


def _report(counts: JsonDict, questions: int, seconds: float) -> None:
    common.say(
        f"answers: {counts['questions_with_answer']:,} of {questions:,} questions have"
        f" an answer in {counts['passages']:,} passages, {counts['pairs']:,} pairs in"
        f" {seconds:.1f} s"
    )
    said = {
        "unmatchable_answers": "answers are an article or a punctuation mark alone and"
        " are not looked for",
        "unfiltered_patterns": "regular expressions have no fixed letters and were"
        " tried on every passage",
    }
    for name, text in said.items():
        if counts[name]:
            common.say(f"answers: {counts[name]:,} {text}")


def entry() -> None:
    """Console script."""
    common.run(main, name="find_answers")


if __name__ == "__main__":
    entry()
