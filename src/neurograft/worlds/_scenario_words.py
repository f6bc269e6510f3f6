"""Roles, choices and their attributes: what `scenarios` puts together."""

from __future__ import annotations

ROLES = (
    "a retired sea captain", "a young mother of twins", "the owner of a small bakery", "a night-shift nurse",
    "a violin teacher", "a long-distance runner", "the mayor of a mountain village", "a beekeeper",
    "a graduate student in geology", "a blind piano tuner", "a travelling clown", "a court interpreter",
    "a fisherman on a cold coast", "an astronomer", "a truck driver", "a widowed watchmaker", "a school librarian",
    "a stage designer", "a vineyard keeper", "a chess grandmaster", "a kindergarten cook", "a bush pilot",
    "a tax adviser", "a sculptor in stone", "a ranger in a marsh", "a bus conductor", "a portrait photographer",
    "an emergency doctor", "a lighthouse keeper", "a shepherd", "a puppeteer", "a bridge engineer",
    "a coffee roaster", "a wheelchair basketball player", "a judge", "a dog groomer", "an opera singer",
    "a bicycle courier", "a botanist", "a glassblower",
)  # fmt: skip

# choice: attributes as (name, units, low, high)
CHOICES: dict[str, tuple[tuple[str, str, float, float], ...]] = {
    "a flat to rent": (
        ("rent", "euros a month", 500, 2500), ("floor space", "square metres", 25, 120), ("daylight", "hours", 2, 12),
        ("street noise", "decibels", 30, 80), ("way to the station", "minutes on foot", 1, 45), ("rooms", "", 1, 6),
        ("age of the house", "years", 0, 150),
    ),
    "a train journey": (
        ("fare", "euros", 10, 300), ("travel time", "hours", 1, 20), ("changes", "", 0, 5),
        ("leg room", "centimetres", 60, 110), ("punctuality", "percent", 50, 100), ("departure", "o'clock", 5, 23),
    ),
    "a used bicycle": (
        ("price", "euros", 50, 1500), ("weight", "kilograms", 7, 22), ("gears", "", 1, 27),
        ("distance ridden", "kilometres", 0, 20000), ("tyre width", "millimetres", 23, 60), ("age", "years", 0, 20),
    ),
    "a loan": (
        ("interest", "percent", 1, 15), ("term", "months", 6, 120), ("fee", "euros", 0, 900),
        ("grace period", "months", 0, 12), ("customer rating", "stars", 1, 5), ("waiting time", "days", 1, 40),
    ),
    "a week of holidays": (
        ("price", "euros", 200, 3000), ("temperature", "degrees", 5, 38), ("distance to water", "kilometres", 0, 60),
        ("flight", "hours", 0, 15), ("other guests", "", 2, 900), ("rain", "days", 0, 7),
    ),
    "a dog to adopt": (
        ("age", "years", 0, 14), ("weight", "kilograms", 2, 70), ("exercise needed", "hours a day", 0.5, 4),
        ("barking", "times an hour", 0, 30), ("fee", "euros", 0, 800), ("coat length", "centimetres", 1, 20),
    ),
    "a restaurant for tonight": (
        ("cost of a meal", "euros", 8, 120), ("dishes", "", 5, 90), ("way", "kilometres", 0, 30),
        ("rating", "stars", 1, 5), ("wait for a table", "minutes", 0, 90), ("guests", "", 5, 200),
    ),
    "a job offer": (
        ("salary", "euros a month", 1500, 9000), ("days off", "a year", 15, 45), ("commute", "minutes", 0, 120),
        ("colleagues", "", 1, 400), ("work from home", "days a week", 0, 5), ("notice period", "weeks", 1, 26),
    ),
    "a laptop": (
        ("price", "euros", 300, 3500), ("battery", "hours", 3, 24), ("weight", "kilograms", 0.8, 3.5),
        ("screen", "inches", 11, 18), ("memory", "gigabytes", 4, 128), ("fan noise", "decibels", 15, 55),
    ),
    "a garden plot": (
        ("area", "square metres", 40, 900), ("lease", "euros a year", 50, 1200), ("sun", "hours a day", 2, 12),
        ("slope", "percent", 0, 30), ("way to water", "metres", 0, 300), ("fruit trees", "", 0, 25),
    ),
    "a language course": (
        ("fee", "euros", 50, 1800), ("lessons", "a week", 1, 10), ("group size", "people", 1, 30),
        ("length", "weeks", 2, 52), ("homework", "hours a week", 0, 12), ("way", "minutes", 0, 60),
    ),
    "a camera": (
        ("price", "euros", 100, 4000), ("weight", "grams", 150, 1600), ("resolution", "megapixels", 8, 100),
        ("zoom", "times", 1, 60), ("battery", "shots", 150, 2000), ("lenses", "", 1, 8),
    ),
    "an insurance": (
        ("premium", "euros a month", 5, 250), ("excess", "euros", 0, 2500), ("cover", "thousand euros", 10, 900),
        ("hotline", "hours a day", 4, 24), ("minimum term", "months", 1, 60), ("claims paid", "percent", 60, 99),
    ),
    "a wine for a feast": (
        ("price", "euros a bottle", 4, 150), ("age", "years", 0, 30), ("alcohol", "percent", 8, 16),
        ("sweetness", "grams a litre", 0, 90), ("critic's score", "points", 60, 100), ("bottles left", "", 1, 80),
    ),
    "a place for a wedding": (
        ("hire", "euros", 300, 9000), ("seats", "", 20, 300), ("way", "kilometres", 1, 150), ("beds", "", 0, 120),
        ("closing time", "hours after noon", 8, 18), ("size of the garden", "square metres", 0, 5000),
    ),
    "a sofa": (
        ("price", "euros", 150, 4000), ("width", "centimetres", 120, 340), ("softness", "points", 1, 10),
        ("delivery", "weeks", 1, 16), ("warranty", "years", 0, 10), ("weight", "kilograms", 25, 140),
    ),
    "a hiking trail": (
        ("length", "kilometres", 3, 40), ("climb", "metres", 0, 2200), ("huts on the way", "", 0, 6),
        ("shade", "percent", 0, 100), ("other hikers", "an hour", 0, 80), ("drive to its start", "minutes", 0, 150),
    ),
    "a physician": (
        ("wait for an appointment", "days", 0, 60), ("experience", "years", 1, 40), ("rating", "stars", 1, 5),
        ("way", "minutes", 1, 90), ("time for each patient", "minutes", 4, 45), ("fee", "euros", 0, 300),
    ),
    "a musical instrument": (
        ("price", "euros", 80, 8000), ("age", "years", 0, 120), ("loudness", "decibels", 40, 110),
        ("weight", "kilograms", 0.3, 30), ("rent", "euros a month", 5, 150), ("repairs needed", "", 0, 6),
    ),
    "a plan for electricity": (
        ("price", "cents a kilowatt-hour", 18, 60), ("base fee", "euros a month", 2, 30),
        ("wind power", "percent", 0, 100),
        ("price guarantee", "months", 0, 36), ("bonus", "euros", 0, 300), ("notice period", "weeks", 1, 12),
    ),
}  # fmt: skip
