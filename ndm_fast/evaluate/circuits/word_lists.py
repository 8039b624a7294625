"""Templates and words of the circuit tests, our own. Every name has a space before it, as in running text."""

from __future__ import annotations

IOI_TEMPLATES = (
    "Yesterday {a} and {b} met at the {place}, and {s} handed a {thing} to",
    "When {a} and {b} came back from the {place}, {s} gave a {thing} to",
    "After {a} and {b} had left the {place}, {s} sent a {thing} to",
    "While {a} and {b} waited outside the {place}, {s} offered a {thing} to",
    "Then {a} and {b} talked for hours at the {place}, and {s} showed a {thing} to",
    "Because {a} and {b} work together in the {place}, {s} lent a {thing} to",
    "Last week {a} and {b} walked through the {place}. At the end {s} passed a {thing} to",
    "As soon as {a} and {b} had found the {place}, {s} brought a {thing} to",
)
"""{a} and {b} are the two names in either order, {s} is the one that is said again."""

PLACES = (
    "market",
    "office",
    "library",
    "station",
    "garden",
    "museum",
    "hospital",
    "kitchen",
    "school",
    "park",
)


THINGS = ("letter", "ticket", "book", "lamp", "map", "coin", "ring", "basket", "picture", "key")

_NAMES = (
    "Mary John James Robert Michael David William Richard Thomas Charles Daniel Matthew Anthony Mark Paul "
    "Steven Andrew Kenneth Joshua Kevin Brian George Edward Jason Ryan Jacob Nicholas Eric Jonathan Stephen "
    "Justin Scott Benjamin Samuel Gregory Frank Alexander Raymond Patrick Jack Dennis Tyler Aaron Adam Henry "
    "Nathan Peter Kyle Walter Ethan Keith Roger Noah Carl Sean Arthur Lawrence Dylan Jordan Bruce Albert "
    "Gabriel Logan Alan Roy Ralph Eugene Vincent Russell Louis Philip Laura Sarah Emily Anna Emma Alice Kate "
    "Lisa Susan Karen Nancy Jane Rachel Amy Julia Grace Victoria Hannah Maria Helen Rose Kelly Simon Tom Luke"
)


NAMES = tuple(_NAMES.split())

_NOUNS = (
    "war siege strike festival voyage drought campaign trial reign plague dispute project expedition journey "
    "marriage famine occupation exhibition rebellion construction negotiation revolt epidemic tour alliance "
    "embargo ceasefire empire debate tournament flood migration"
)


NOUNS = tuple(_NOUNS.split())

YEARS_TEMPLATE = "The {noun} lasted from the year {year} to {century}"


CENTURIES = tuple(range(11, 19))
