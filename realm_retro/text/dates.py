r"""A grammar of the dates that English text mentions: days, months, years, centuries.

REALM masks dates beside named entities; the paper finds them with a regular
expression that it does not print. This one knows

* days      12 March 1994, March 12, 1994, the 4th of July, 1994-03-12, 3/12/1994
* months    March 1994, in March, early March
* years     1994, 1914–18, 44 BC, AD 79, c. 1520, spring 1994
* more      the 1990s, the '60s, the 18th century, Monday
"""

from __future__ import annotations

import re

_MONTH = (
    "(?:January|February|March|April|May|June|July|August|September|October|November"
    r"|December|(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\b\.?)"
)
# "March" and "May" alone are often words of another kind.
_PLAIN_MONTH = (
    "(?:January|February|April|June|July|August|September|October|November|December)"
)
_DAY_NUMBER = r"(?:3[01]|[12]\d|0?[1-9])"
_DAY = rf"{_DAY_NUMBER}(?:st|nd|rd|th)?"
_YEAR = r"(?:1\d{3}|20\d{2})"
_DASH = "[-–—/]"
_ERA = r"(?:BCE?|CE|AD|B\.C\.(?:E\.)?|A\.D\.|C\.E\.)(?!\w)"
_PART = "(?:(?:[Ee]arly|[Mm]id|[Ll]ate)[- ])"
_SEASON = "(?:[Ss]pring|[Ss]ummer|[Aa]utumn|[Ff]all|[Ww]inter)"
_ORDINAL = (
    r"(?:\d{1,2}(?:st|nd|rd|th)|[Ff]irst|[Ss]econd|[Tt]hird|[Ff]ourth|[Ff]ifth|[Ss]ixth"
    "|[Ss]eventh|[Ee]ighth|[Nn]inth|[Tt]enth|[Ee]leventh|[Tt]welfth|[Tt]hirteenth"
    "|[Ff]ourteenth|[Ff]ifteenth|[Ss]ixteenth|[Ss]eventeenth|[Ee]ighteenth"
    "|[Nn]ineteenth|[Tt]wentieth|[Tt]wenty-[Ff]irst)"
)
_WEEKDAY = "(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
# What makes an amount of a number such as 1500.
_NO_AMOUNT = (
    rf"(?!{_DASH}?\d|[.,:]\d|%|[ -](?:per ?cent|hours?|minutes?|seconds?|times?|people"
    "|persons?|men|women|troops|soldiers|students|inhabitants|residents|members|votes"
    "|copies|units|km²?|k?m|mi|cm|mm|kg|g|lb|ft|feet|foot|inch(?:es)?|acres|hectares"
    "|(?:kilo)?met(?:re|er)s?|miles?|tons?|tonnes|species|million|billion|thousand"
    "|dollars|pounds|euros|horsepower|hp|[kM]?W|[kMG]?Hz|points|pages|seats|employees"
    r"|words|years?|days?|weeks?|months?)\b)"
)

# Longest first: of alternatives that match at one place, the first is taken.
_ALTERNATIVES = (
    rf"{_YEAR}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])(?!\d)",
    rf"(?:{_WEEKDAY},? )?"
    rf"(?:(?:{_DAY_NUMBER} ?{_DASH} ?)?{_DAY}(?: of)? {_MONTH}(?!\w)"
    rf"|{_MONTH} {_DAY}(?: ?{_DASH} ?{_DAY_NUMBER})?(?!\d|[.,:]\d|st|nd|rd|th))"
    rf"(?:,? (?:{_YEAR}(?!\d)|\d{{1,4}} {_ERA}))?",
    rf"(?:{_PART}|{_SEASON} )?{_MONTH},?(?: of)? {_YEAR}(?!\d)",
    rf"{_DAY_NUMBER}(?P<mark>[/.]){_DAY_NUMBER}(?P=mark){_YEAR}(?!\d)",
    rf"{_PART}?(?:1\d\d|20\d)0[’']?s(?!\w)",
    r"[’'][2-9]0s(?!\w)",
    rf"{_PART}?{_ORDINAL}(?:(?:{_DASH}| to | and ){_ORDINAL})?[- ][Cc]entur(?:y|ies)\b"
    rf"(?: {_ERA})?",
    rf"\d{{1,5}}(?: ?{_DASH} ?\d{{1,5}})? {_ERA}",
    r"(?:AD|A\.D\.) \d{1,4}(?!\d)",
    rf"{_SEASON}(?: of)? {_YEAR}(?!\d)",
    rf"{_PART}?{_YEAR} ?{_DASH} ?(?:{_YEAR}|\d\d)(?!,?\d)",
    rf"{_PART}?{_YEAR}(?!\w){_NO_AMOUNT}",
    rf"{_PART}{_MONTH}(?!\w)",
    rf"{_PLAIN_MONTH}(?!\w)",
    r"(?<=\b[Ii]n )(?:March|May)(?!\w)|(?<=\b(?:of|by) )(?:March|May)(?!\w)",
    rf"{_WEEKDAY}s?(?!\w)",
)
_DATE = re.compile(rf"(?<![\w$£€¥#])(?<!\d[.,:])(?:{'|'.join(_ALTERNATIVES)})")


def date_chars(text: str) -> list[tuple[int, int]]:
    """The dates of a text, [start, end) in characters, ascending, none overlapping."""
    return [match.span() for match in _DATE.finditer(text)]
