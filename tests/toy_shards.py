"""The embed stage with an encoder that can be held up: a process to be killed.

``python toy_shards.py WORKDIR ENCODER NAME [--flag …] [key=value …]`` runs the stage.
With ``hold=3`` it stops in its third batch: it creates ``NAME.in`` in the workdir and
goes on when ``NAME.go`` is there. ``pause`` are the seconds that each batch takes.
"""

import dataclasses
import pathlib
import sys
import time

import ml_collections
from absl import flags
from etils import epath

from realm_retro.cli import embed, encoders
from realm_retro.errors import UserError

SHARD_SIZE = 16


def config_of(encoder):
    return ml_collections.ConfigDict(
        {
            "encoder": {"path": str(encoder), "max_tokens": 8},
            "embed": {"shard_size": SHARD_SIZE, "batch_tokens": 64},
        }
    )


def held_up(build, workdir, name, hold, pause):
    entered, go = (workdir / f"{name}.{end}" for end in ("in", "go"))

    def slow(*args, **kwargs):
        embedder = build(*args, **kwargs)
        batches = 0

        def apply(ids, lengths):
            nonlocal batches
            batches += 1
            if batches == hold:
                entered.touch()
                while not go.exists():
                    time.sleep(0.005)
            time.sleep(pause)
            return embedder.apply(ids, lengths)

        return dataclasses.replace(embedder, apply=apply)

    return slow


def main():
    workdir, encoder, name, *words = sys.argv[1:]
    flags.FLAGS([sys.argv[0], *(word for word in words if word.startswith("--"))])
    options = dict(word.split("=") for word in words if not word.startswith("--"))
    encoders.build_embedder = held_up(
        encoders.build_embedder,
        pathlib.Path(workdir),
        name,
        int(options.get("hold", 0)),
        float(options.get("pause", 0.0)),
    )
    try:
        embed.main(config_of(encoder), epath.Path(workdir))
    except UserError as error:
        sys.exit(f"refused: {error}")


if __name__ == "__main__":
    main()
