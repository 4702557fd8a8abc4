r"""Measures the costs that should stay flat, on your own machine: one suite a run.

A suite prints a table and writes the same as JSON, with the machine, the versions, the
settings and every single value. Alternatives take turns, so that the machine's moods
hit all alike; medians, least and most are shown, ratios are of pairs that were measured
one after the other, and a target stands beside the ratio that it is of. Run it on a
machine with nothing else to do.

  refresh     a REALM step with refresh workers beside it and without, each on cores of
              its own; 5 % apart at most. --workers, --worker_cores, --steps
  retrieval   what looking candidates up one step ahead adds to a REALM step: 10 % of it
              at most; and the parts of a lookup. --steps
  checkpoint  how long a save holds the training up, and a resume takes. --steps
  memory      peak memory of prepare, embed and find_neighbours over a range of corpus
              sizes: the largest at most 10 % above the smallest. --documents, --scales
  search      latency and throughput of exact search and ScaNN against the number of
              vectors: those of the workdir, or made-up ones; needs no --config.
              --rows, --dim, --k
  startup     from the command train to its first step, with the compilation cache cold
              and warm

Reads   WORKDIR's artefacts; stages that are missing are run first, with the config.
        Suites refresh and retrieval take a config of REALM's pre-training, memory one
        of RETRO, checkpoint and startup any. Smaller models, batches and corpora are
        set as for training: --config.train.batch_size=2
Writes  WORKDIR/benchmarks/SUITE.json, and SUITE.log with what other processes said.
        Runs and indexes of the workdir are left alone.

Examples:
  python -m realm_retro.cli.benchmark --suite=search --workdir=/tmp/w
  python -m realm_retro.cli.benchmark --suite=memory --workdir=/tmp/w \
      --config=configs/retro/quickstart.py --documents=100
  python -m realm_retro.cli.benchmark --suite=refresh --workdir=/tmp/realm \
      --config=configs/realm/quickstart.py --config.corpus.articles=300
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

import ml_collections
from absl import flags
from etils import epath

from realm_retro.cli import common, processes
from realm_retro.cli.benchmarks import machine, report, workdirs
from realm_retro.cli.benchmarks.report import Report
from realm_retro.errors import UserError

# Suite → the flags that it reads, besides those that all of them do.
SUITES = {
    "refresh": ("steps", "workers", "worker_cores", "worker_environment"),
    "retrieval": ("steps",),
    "checkpoint": ("steps",),
    "memory": ("documents", "scales"),
    "search": ("rows", "dim", "k"),
    "startup": (),
}
_NEEDS_NO_CONFIG = ("search",)
_MODULE = "realm_retro.cli.benchmark"

SUITE = flags.DEFINE_enum("suite", None, list(SUITES), "What is measured; see above.")
ROUNDS = flags.DEFINE_integer(
    "rounds", 5, "How often each alternative is measured.", lower_bound=1
)
REPORT = flags.DEFINE_string(
    "report", "", "Where the JSON goes; WORKDIR/benchmarks/SUITE.json if empty."
)
STEPS = flags.DEFINE_integer(
    "steps",
    4,
    "refresh, retrieval, checkpoint: training steps of a timed block.",
    lower_bound=1,
)
WORKERS = flags.DEFINE_integer(
    "workers", 1, "refresh: worker processes beside the training.", lower_bound=1
)
WORKER_CORES = flags.DEFINE_integer(
    "worker_cores",
    0,
    "refresh: cores that the workers have; the training keeps the others. 0 for half.",
    lower_bound=0,
)
WORKER_ENVIRONMENT = flags.DEFINE_multi_string(
    "worker_environment",
    [],
    "refresh: NAME=VALUE, set for the workers, such as CUDA_VISIBLE_DEVICES=1; beside a"
    " training on an accelerator they embed on the CPU unless this says otherwise.",
)
DOCUMENTS = flags.DEFINE_integer(
    "documents",
    60,
    "memory: documents of the smallest corpus, each of about ten chunks.",
    lower_bound=10,
)
SCALES = flags.DEFINE_list(
    "scales", ["1", "4", "16"], "memory: sizes of the corpora, as multiples of that."
)
ROWS = flags.DEFINE_list(
    "rows", ["4000", "16000", "64000"], "search: numbers of vectors."
)
DIM = flags.DEFINE_integer(
    "dim", 384, "search: width of made-up vectors.", lower_bound=2
)
K = flags.DEFINE_integer(
    "k", 10, "search: neighbours that are searched for.", lower_bound=1
)


def main(config: ml_collections.ConfigDict | None, workdir: epath.Path) -> None:
    """Runs one suite; see the module docstring."""
    suite, load_before = SUITE.value, machine.load()
    assert suite is not None
    _check(suite, config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with processes.terminated_like_ctrl_c():
        found = _run(suite, config, workdir)
    body = report.as_json(
        found,
        suite=suite,
        command=shlex.join(["python", "-m", _MODULE, *sys.argv[1:]]),
        machine=machine.facts(load_before=load_before),
    )
    path = epath.Path(REPORT.value or workdir / workdirs.RESULTS / f"{suite}.json")
    report.write(path, body)
    common.say(f"\n{report.render(body)}\n\nAs JSON, with every value: {path}")


def _check(
    suite: str, config: ml_collections.ConfigDict | None, workdir: epath.Path
) -> None:
    """Refuses what a suite would ignore, or miss later."""
    for other, names in SUITES.items():
        for name in names:
            if flags.FLAGS[name].present and name not in SUITES[suite]:
                raise UserError(
                    f"--{name} is of --suite={other}; {suite} reads"
                    f" {', '.join(f'--{own}' for own in (*SUITES[suite], 'rounds'))}"
                )
    if config is None and suite not in _NEEDS_NO_CONFIG:
        raise UserError(
            f"--config is missing: --suite={suite} runs what it says; --help has"
            " examples"
        )
    if "://" in str(workdir):
        raise UserError(
            f"--workdir={workdir}: benchmarks need a folder of this machine, not a"
            " bucket"
        )


def _run(
    suite: str, config: ml_collections.ConfigDict | None, workdir: epath.Path
) -> Report:
    # JAX takes a while to import, and one suite has to start without it.
    rounds = ROUNDS.value
    if suite == "search":
        from realm_retro.cli.benchmarks import search

        return search.measure(
            workdir,
            rows=_numbers("rows", ROWS.value),
            dim=DIM.value,
            k=K.value,
            rounds=rounds,
        )
    assert config is not None
    if suite == "memory":
        from realm_retro.cli.benchmarks import memory

        scales = _numbers("scales", SCALES.value)
        return memory.measure(
            config, workdir, documents=DOCUMENTS.value, scales=scales, rounds=rounds
        )
    if suite == "startup":
        from realm_retro.cli.benchmarks import startup

        return startup.measure(config, workdir, rounds=rounds)
    if suite == "refresh":
        from realm_retro.cli.benchmarks import refresh

        beside = refresh.Beside(
            WORKERS.value, WORKER_CORES.value, _variables(WORKER_ENVIRONMENT.value)
        )
        return refresh.measure(
            config, workdir, num_steps=STEPS.value, rounds=rounds, beside=beside
        )
    from realm_retro.cli.benchmarks import checkpoint, retrieval

    measure = {"retrieval": retrieval.measure, "checkpoint": checkpoint.measure}[suite]
    return measure(config, workdir, num_steps=STEPS.value, rounds=rounds)


def _numbers(flag: str, words: Sequence[str]) -> list[int]:
    """Sizes in ascending order.

    Raises:
      UserError: one is not a number above 0, or there is none.
    """
    try:
        found = sorted({int(word) for word in words})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise UserError(
            f"--{flag}={','.join(words)}: whole numbers above 0, with commas between"
            " them, such as 1,4,16"
        )
    return found


def _variables(words: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE as a mapping.

    Raises:
      UserError: a word has another form.
    """
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise UserError(f"--worker_environment={word}: must be NAME=VALUE")
        found[name] = value
    return found


def entry() -> None:
    """Console script."""
    common.run(main, name="benchmark", required=("suite", "workdir"))


if __name__ == "__main__":
    entry()
