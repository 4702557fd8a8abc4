r"""Answers questions over a workdir's passages, and shows what the answers stand on.

Reads:   WORKDIR/passages, WORKDIR/runs/NAME/checkpoints
Writes:  WORKDIR/indexes, where it is not there yet; answers to standard output

  python -m realm_retro.cli.ask --config=configs/realm/quickstart.py:finetune \
      --workdir=/tmp/realm --question="Who was put in command in 1775?"

--question may be given several times; --questions_file holds one question a line, or is
a .jsonl with the field "question". With neither, questions are read from the terminal.
--json writes one JSON object a line. Run a first time, a program is compiled; that is
done before the clock starts. Without a reader (a pre-training run, or none at all) the
passages that are found are shown.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags
from etils import epath

from realm_retro.cli import common, qa_setup, towers
from realm_retro.errors import UserError
from realm_retro.realm.answer import Answerer
from realm_retro.realm.evidence import Answer, Evidence
from realm_retro.typing import Config

QUESTION = flags.DEFINE_multi_string(
    "question", [], "A question to answer; may be repeated."
)
QUESTIONS_FILE = flags.DEFINE_string(
    "questions_file", None, "A UTF-8 file with one question a line, or a .jsonl."
)

# Characters of a question that are shown, and of a passage around an answer.
_SHOWN = 400
_WIDTH = 88


def main(config: Config, workdir: epath.Path) -> None:
    """Answers all questions of the command line; see the module docstring."""
    answer_all(config, workdir, as_json=bool(flags.FLAGS["json"].value))


def answer_all(config: Config, workdir: epath.Path, *, as_json: bool = False) -> None:
    """`main`, with its own flag as an argument."""
    # With JSON on standard output, everything else goes to standard error.
    say = (
        functools.partial(print, file=sys.stderr, flush=True) if as_json else common.say
    )
    questions = list(_questions())
    if not questions and (QUESTION.value or QUESTIONS_FILE.value):
        raise UserError(f"{QUESTIONS_FILE.value or '--question'}: holds no question")
    answerer = _open(config, workdir, say)
    show = _as_json if as_json else _as_text
    if questions:
        size = qa_setup.qa_config(config).eval_batch_size
        groups = [questions[i : i + size] for i in range(0, len(questions), size)]
        answerer.answer(groups[0])  # compiles
        for group in groups:
            _show(answerer, group, show, say)
        return
    answerer.answer(["What is asked first?"])
    for question in _typed():
        _show(answerer, [question], show, say)


def _open(config: Config, workdir: epath.Path, say: Callable[[str], Any]) -> Answerer:
    store = towers.open_store(config, workdir)
    weights = qa_setup.trained_weights(config, workdir)
    if weights is None:
        weights = qa_setup.start_weights(config, workdir)
        say(
            f"ask: there is no run {config.name!r} in {workdir}: passages are found by"
            " the weights that it would start from, and nothing reads them"
        )
    elif "reader" not in weights.params:
        say(f"ask: the run {config.name!r} has no reader: passages are found only")
    return qa_setup.open_answerer(config, workdir, weights, store, say)


def _show(
    answerer: Answerer,
    questions: Sequence[str],
    show: Callable[[Answer], Iterator[str]],
    say: Callable[[str], Any],
) -> None:
    for answer in answerer.answer(questions):
        if answer.cut:
            say(
                f"ask: {answer.question[:40]!r}… is longer than config.model."
                f"query_length={answerer.config.query_length} wordpieces and was cut"
            )
        for line in show(answer):
            common.say(line)


def _as_json(answer: Answer) -> Iterator[str]:
    yield json.dumps(answer.as_json(), ensure_ascii=False)


def _as_text(answer: Answer) -> Iterator[str]:
    question = answer.question
    if len(question) > _SHOWN:
        question = f"{question[:_SHOWN].rstrip()} …"
    yield f"\nQuestion: {question}"
    if answer.text is not None:
        given = answer.text or "no passage was found"
        yield f"Answer:   {given}   (p = {answer.probability:.3f})"
    for place, passage in enumerate(answer.passages, start=1):
        head = f"{place}. p(z|x) = {passage.probability:.3f}"
        yield f"  {head}  {passage.title or passage.document}"
        yield textwrap.fill(
            excerpt(passage),
            _WIDTH,
            initial_indent=" " * 5,
            subsequent_indent=" " * 5,
            break_long_words=False,
        )
    if answer.null_mass is not None:
        yield f"  null document: p(z|x) = {answer.null_mass:.3f}"
    times = dataclasses.asdict(answer.seconds).items()
    parts = [f"{name} {1000 * seconds:.1f}" for name, seconds in times]
    yield f"  time in ms: {', '.join(parts)}; {1000 * answer.seconds.total:.1f} in all"


def excerpt(passage: Evidence, most: int = _SHOWN) -> str:
    """A passage's text on one line, the answer in [[ ]], cut around it to `most`."""
    text, span = passage.text, passage.span
    start, end = span or (0, 0)
    # As much before as after; what one side does not need goes to the other.
    first = max(0, min(start - (most - (end - start)) // 2, len(text) - most))
    last = min(len(text), max(first + most, end))
    if span:
        inside = f"{text[first:start]}[[{text[start:end]}]]{text[end:last]}"
    else:
        inside = text[first:last]
    left, right = "… " if first else "", " …" if last < len(text) else ""
    return left + " ".join(inside.split()) + right


def _questions() -> Iterator[str]:
    """Those of the command line."""
    for question in QUESTION.value:
        if question.strip():
            yield question.strip()
    if not QUESTIONS_FILE.value:
        return
    path = epath.Path(QUESTIONS_FILE.value).expanduser()
    lines = common.lines_of(path, flag="--questions_file")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"--questions_file {path}:{number}"
            yield _field(line, where) if path.suffix == ".jsonl" else line.strip()


def _field(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error})") from None
    question = record.get("question") if isinstance(record, dict) else None
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: has no text in the field 'question'")
    return question.strip()


def _typed() -> Iterator[str]:
    """Questions from the terminal, until an empty line or its end."""
    prompt = "\nQuestion (empty to end): " if sys.stdin.isatty() else ""
    while True:
        if prompt:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.strip()


def entry() -> None:
    """The console script."""
    # Here, not above: another command has a flag of this name, of another kind.
    flags.DEFINE_bool("json", False, "Write one JSON object a line.")
    common.run(main, name="ask")


if __name__ == "__main__":
    entry()
