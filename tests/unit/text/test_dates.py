"""The grammar of dates: what is one, and which numbers are not."""

import pytest

from realm_retro.text.dates import date_chars


def dates(text):
    return [text[start:end] for start, end in date_chars(text)]


@pytest.mark.parametrize(
    "date",
    [
        "12 March 1994",
        "March 12, 1994",
        "12th of March, 1994",
        "4th of July",
        "May 5",
        "Dec. 25, 1901",
        "12–14 March 1994",
        "March 12–14, 1994",
        "Monday, 12 March 1994",
        "1994-03-12",
        "3/12/1994",
        "March 1994",
        "March, 1994",
        "early March 1994",
        "March of 1994",
        "early March",
        "September",
        "1994",
        "1914–18",
        "1914-1918",
        "mid-1994",
        "44 BC",
        "300–200 BC",
        "15 March 44 BC",
        "AD 79",
        "500 CE",
        "1990s",
        "late 1990s",
        "'60s",
        "spring 1994",
        "summer of 1969",
        "18th century",
        "early 18th century",
        "fifth century BC",
        "18th and 19th centuries",
        "Monday",
    ],
)
@pytest.mark.parametrize(
    "frame", ["{}", "It was {}.", "(the {}, they say)", "Ünder {}"]
)
def test_dates(date, frame):
    assert dates(frame.format(date)) == [date]


@pytest.mark.parametrize(
    "text",
    [
        "It has 1500 people and 1,994 trees.",
        "It cost $1999 or 1994.50 or 1500 km.",
        "They may march on.",
        "May I march? March on, said May.",
        "Room A1994 and 21994 and 199 and 2500.",
        "at 12:1994",
        "a 1200-foot wall of 1800 metres",
        "the second of ten",
        "30% of 1200 votes",
    ],
)
def test_no_dates(text):
    assert dates(text) == []


def test_march_and_may_need_a_cue():
    assert dates("Born in March, he left by May and came in May 1920.") == [
        "March",
        "May",
        "May 1920",
    ]


def test_several_dates():
    text = "From 1901 to 1905, then on 3 May 1910 and in the 1920s."
    assert dates(text) == ["1901", "1905", "3 May 1910", "1920s"]
