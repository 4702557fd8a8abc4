"""What the quickstart runs: RETRO's stages, or those of REALM."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import flags
from etils import epath
from ml_collections import config_flags

from realm_retro.errors import UserError
from realm_retro.typing import Config

# Words that depend on what the stages before have written.
Late = Callable[[epath.Path], Sequence[str]]

# Questions that are asked at the end.
SHOWN = 3
PACKAGED = "vital_questions"
ANSWERS = "answers.jsonl"
_WORKERS = ("--config.pretrain.refresh=workers",)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A module under `realm_retro.cli` and the output that shows that it finished.

    Attributes:
      module: its name.
      output: file in the workdir.
      variant: the word after the colon of its --config; empty for the caller's own.
      flags: of its own, before those of the caller, which win.
      late: gives more flags when the stages before have finished.
      companion: a module that runs in a process of its own as long as the stage does.
      captured: whether its standard output is the output.
      unread: sections of the config that change nothing of its output; it does not get
        the caller's flags of these, so that they can be changed later.
    """

    module: str
    output: str
    variant: str = ""
    flags: tuple[str, ...] = ()
    late: Late = lambda _: ()
    companion: str = ""
    captured: bool = False
    unread: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique on its road."""
        return f"{self.module}:{self.variant}" if self.variant else self.module


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """The quickstart's own flags, which its stages get too.

    Attributes:
      file: of --config, without the colon and what follows it.
      variant: what follows it.
      others: all other flags, each with the value that follows as a word of its own.
    """

    file: str
    variant: str
    others: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, words: Iterable[str]) -> CommandLine:
        """Takes the words after the program's name apart."""
        given, others = "", []
        rest = iter(words)
        for word in rest:
            if match := re.match(r"--?config(=.*)?$", word, re.DOTALL):
                given = match[1][1:] if match[1] else next(rest, "")
            elif word.startswith("-") or not others:
                others.append([word])
            else:
                others[-1].append(word)
        file, _, variant = given.partition(":")
        return cls(file, variant, tuple(map(tuple, others)))

    def words(self, module: str, stage: Stage) -> list[str]:
        """The command of a module with the settings of a stage."""
        config = [self._config(stage)] if self.file else []
        command = [sys.executable, "-m", f"realm_retro.cli.{module}"]
        given = [flag for flag in self.others if _section(flag) not in stage.unread]
        return [*command, *config, *stage.flags, *itertools.chain(*given)]

    def load(self, variant: str = "", own: Sequence[str] = ()) -> Config:
        """The config as a stage with this variant and these flags will see it."""
        given = itertools.chain(*(flag for flag in self.others if _section(flag)))
        words = [word for word in (variant or self.variant,) if word]
        values = flags.FlagValues()
        argv = ["quickstart", *(word for word in own if _section([word])), *given]
        config = _config_module(self.file).get_config(*words)
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=argv
        )
        values(argv)
        return values["config"].value

    def _config(self, stage: Stage) -> str:
        variant = stage.variant or self.variant
        return f"--config={self.file}" + (f":{variant}" if variant else "")


def retro(config: Config) -> tuple[Stage, ...]:
    """RETRO, from text to samples."""
    run = f"runs/{config.name}"
    return (
        Stage("prepare", "chunks/manifest.json"),
        Stage("embed", "embeddings/manifest.json"),
        Stage("build_index", "index/manifest.json"),
        Stage("find_neighbours", "neighbours/manifest.json"),
        Stage("train", f"{run}/manifest.json"),
        Stage("evaluate", f"{run}/evaluation.json"),
        Stage(
            "generate",
            f"{run}/generation.json",
            late=lambda workdir: [f"--prompt={_held_out_beginning(workdir)}"],
        ),
    )


def realm(line: CommandLine) -> tuple[Stage, ...]:
    """REALM, from text to answers; without questions, to the end of pre-training.

    Args:
      line: the quickstart's own; without a variant.

    Raises:
      UserError: its flags give two runs one name.
    """
    if not line.file:
        raise UserError("REALM's stages need --config on the command line")
    config = line.load(own=_WORKERS)
    companion = "refresh_index" if config.pretrain.refresh == "workers" else ""
    stages = [
        Stage("prepare", "passages/manifest.json"),
        Stage("tag_spans", "spans/manifest.json"),
        Stage(
            "train",
            f"runs/{config.name}/manifest.json",
            flags=_WORKERS,
            companion=companion,
            unread=("qa",),
        ),
    ]
    if not has_questions(config):
        return tuple(stages)
    start, qa = (line.load(variant).name for variant in ("zero_shot", "finetune"))
    if len({str(config.name), start, qa}) < 3:
        raise UserError(
            f"--config.name={config.name} would give all runs of this road one name;"
            " leave it out"
        )
    before = Stage("evaluate_qa", f"runs/{start}/evaluation_qa.json", "zero_shot")
    return (
        *stages[:2],
        before,
        stages[2],
        Stage("train", f"runs/{qa}/manifest.json", "finetune"),
        Stage("evaluate_qa", f"runs/{qa}/evaluation_qa.json", "finetune"),
        Stage(
            "ask",
            f"runs/{qa}/{ANSWERS}",
            "finetune",
            flags=("--json",),
            late=lambda workdir: _surest(workdir / "runs" / qa),
            captured=True,
        ),
    )


def is_realm(config: Config) -> bool:
    """Whether a config is one of REALM's runs."""
    return str(config.get("task", "retro")).startswith("realm")


def has_questions(config: Config) -> bool:
    """Whether config.qa names questions over the config's corpus.

    Those of the package are over its own corpus, in English.
    """
    if config.get("qa", {}).get("questions", PACKAGED) != PACKAGED:
        return True
    corpus = config.corpus
    default = corpus.get("source", "vital_articles") == "vital_articles"
    return default and corpus.get("language", "en") == "en"


def _config_module(file: str) -> Any:
    spec = importlib.util.spec_from_file_location("quickstart_config", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _section(flag: Sequence[str]) -> str:
    """Section of the config that a flag sets a value of; "" for another flag."""
    match = re.match(r"--?(?:no)?config\.(\w+)", flag[0])
    return match[1] if match else ""


def _surest(run: epath.Path) -> list[str]:
    """--question for those that a run answers with the highest probability."""
    lines = (run / "predictions_qa.jsonl").read_bytes().splitlines()
    found = sorted(map(json.loads, lines), key=lambda x: -(x["probability"] or 0.0))
    return [f"--question={one['question']}" for one in found[:SHOWN]]


def _held_out_beginning(workdir: epath.Path) -> str:
    """The first chunk of the first held-out document that has a second one.

    Any language and any corpus has one, the model has never seen it, and as a whole
    chunk it is retrieved for at once.
    """
    from realm_retro.data import chunk_store

    chunks = chunk_store.ChunkStore.open(workdir / "chunks", verify=False)
    held_out = chunks.chunks_of(chunk_store.VALIDATION)
    if not len(held_out):
        return "The"
    documents = chunks.document[held_out]
    goes_on = documents[:-1] == documents[1:]
    first = held_out[int(goes_on.argmax())] if goes_on.any() else held_out[0]
    return chunks.text(int(first)).replace("\0", " ")
