r"""Continues prompts with live retrieval, and shows the passages behind each chunk.

Reads:   WORKDIR/chunks, WORKDIR/embeddings, WORKDIR/index, WORKDIR/runs/NAME
Writes:  WORKDIR/runs/NAME/generation.json, or the file of --json

  python -m realm_retro.cli.generate --config=configs/retro/quickstart.py \
      --workdir=work --prompt="The Amazon rainforest is"

--prompt may be given several times; --prompt_file holds one prompt a line. Sampling is
set by --config.generate.temperature, top_k, top_p, max_tokens, seed and neighbours
(0 is RETRO[OFF]).
"""

from __future__ import annotations

import itertools
import json

import numpy as np
from absl import flags
from etils import epath

from realm_retro import config as config_lib
from realm_retro import disk, progress
from realm_retro.cli import common, encoders
from realm_retro.data.chunk_store import ChunkStore
from realm_retro.errors import UserError
from realm_retro.parallel.mesh import MeshConfig, make_mesh
from realm_retro.retro import generate, recipe
from realm_retro.train import checkpoint
from realm_retro.typing import Config, HostArray, JsonDict

PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; may be repeated.")
PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "A UTF-8 file with one prompt a line."
)
JSON = flags.DEFINE_string(
    "json", None, "Where to write what was generated; default: in the run's folder."
)
_FORMAT_VERSION = 1


def main(config: Config, workdir: epath.Path) -> None:
    """Generates for all prompts in one batch."""
    settings = config_lib.build(
        generate.GenerateConfig,
        config_lib.section(config, "generate"),
        name="config.generate",
    )
    prompts = _prompts()
    model = recipe.model_config(config)
    mesh = make_mesh(
        config_lib.build(
            MeshConfig, config_lib.section(config, "mesh"), name="config.mesh"
        )
    )
    store = recipe.open_store(model, workdir)
    run_dir = workdir / "runs" / config.name
    params, _ = checkpoint.restore_params(run_dir, recipe.init_fn(model), mesh)
    retrieve = None
    if model.retrieves and settings.neighbours:
        retrieve = _live_retrieval(config, workdir, store, settings.neighbours)
    else:
        model, params = recipe.without_retrieval(model, params, mesh)
    tokenizer = store.tokenizer
    with progress.bar(total=None, unit="chunks", label="generate") as bar:
        made = generate.generate(
            model,
            params,
            [tokenizer.encode(prompt) for prompt in prompts],
            settings,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            retrieve=retrieve,
            on_chunk=bar.update,
        )
    report = [
        _describe(store, prompt, made, row, settings)
        for row, prompt in enumerate(prompts)
    ]
    path = epath.Path(JSON.value) if JSON.value else run_dir / "generation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {"format_version": _FORMAT_VERSION, "generations": report}
    with disk.replacing(path) as temporary:
        temporary.write_text(json.dumps(body, indent=1, ensure_ascii=False))
    for one in report:
        _print(one)
    common.say(f"\nwritten to {path}")


def _prompts() -> list[str]:
    prompts = list(PROMPT.value)
    if PROMPT_FILE.value:
        path = epath.Path(PROMPT_FILE.value)
        lines = common.lines_of(path, flag="--prompt_file")
        prompts += [line for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"--prompt_file {path}: holds no prompt; one a line")
    return prompts or [""]


def _live_retrieval(
    config: Config, workdir: epath.Path, store: ChunkStore, k: int
) -> generate.RetrieveFn:
    """Embeds a chunk's text as the corpus was embedded and searches the index."""
    retriever = encoders.open_retriever(config, workdir)

    def retrieve(tokens: HostArray) -> generate.Retrieved:
        texts = [store.tokenizer.decode(row) for row in tokens]
        found = retriever.search_texts(texts, k)
        near, mask = store.with_continuation(found.ids)
        return generate.Retrieved(found.ids, found.scores, near, mask)

    return retrieve


def _describe(
    store: ChunkStore,
    prompt: str,
    made: generate.Generated,
    row: int,
    settings: generate.GenerateConfig,
) -> JsonDict:
    """One row as JSON: its text chunk by chunk, each with what it retrieved."""
    m, tokenizer = store.chunk_length, store.tokenizer
    tokens = made.tokens[row]
    # Chunks are counted with BOS in front: the first one shows m − 1 tokens.
    borders = [0, *range(m - 1, len(tokens), m), len(tokens)]
    chunks = []
    for number, (start, end) in enumerate(itertools.pairwise(borders)):
        whole = end - start == (m - 1 if number == 0 else m)
        shown = []
        if whole and number < len(made.retrieved):
            near = made.retrieved[number]
            shown = [
                _passage(store, chunk, score)
                for chunk, score in generate.passages(near, row)
            ]
        text = tokenizer.decode(tokens[start:end])
        chunks.append({"tokens_text": text, "passages": shown})
    return {
        "prompt": prompt,
        "text": tokenizer.decode(tokens),
        "continuation": tokenizer.decode(tokens[len(tokens) - made.new[row] :]),
        "new_tokens": made.new[row],
        "neighbours": settings.neighbours,
        "chunks": chunks,
    }


def _passage(store: ChunkStore, chunk: int, score: float) -> JsonDict:
    tokens, mask = store.with_continuation(np.asarray(chunk))
    document = int(store.document[chunk])
    return {
        "chunk": chunk,
        "document": store.documents.id(document),
        "title": store.documents.title(document),
        "score": score,
        "text": store.tokenizer.decode(tokens[mask]),
    }


def _print(one: JsonDict) -> None:
    common.say(f"\n=== {one['prompt']!r} (+{one['new_tokens']} tokens)")
    for number, chunk in enumerate(one["chunks"], start=1):
        common.say(f"\n{chunk['tokens_text']}")
        for passage in chunk["passages"]:
            text = " ".join(passage["text"].split())
            common.say(
                f"    [chunk {number} retrieved, score {passage['score']:.3f}]"
                f" {passage['title'] or passage['document']}: {text[:160]}"
            )


def entry() -> None:
    """The console script."""
    common.run(main, name="generate")


if __name__ == "__main__":
    entry()
