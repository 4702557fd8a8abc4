"""The commands of question answering, one after the other, as a test runs them.

  python tests/qa_road.py WORKDIR

A process of its own, with one device: eight simulated ones on few cores are slow.
"""

import sys

import tiny_qa
from absl import flags
from etils import epath

from realm_retro.cli import ask, common, evaluate_qa, train


def evaluate(config, workdir, name):
    evaluate_qa.main(config, workdir)
    report = workdir / "runs" / config.name / evaluate_qa.REPORT
    (workdir / f"{name}.json").write_text(report.read_text())


def main(workdir):
    """Zero-shot, fine-tuning until the facts are known, evaluation, questions."""
    flags.FLAGS.mark_as_parsed()
    tiny_qa.write_passages(workdir)
    path = tiny_qa.write_questions(workdir / "q.jsonl")
    config = tiny_qa.config(
        path, qa__holdout=0.0, qa__bm25=True, train__steps=100, train__log_every=20
    )
    flags.FLAGS["questions"].value = str(path)
    evaluate(config, workdir, "before")
    train.main(config, workdir)
    evaluate(config, workdir, "after")
    flags.FLAGS["question"].value = ["born riva", "born sumo"]
    common.say("ask:")
    ask.answer_all(config, workdir)
    common.say("ask --json:")
    ask.answer_all(config, workdir, as_json=True)


if __name__ == "__main__":
    main(epath.Path(sys.argv[1]))
