"""Plain word lists of the curriculum: everything that a question can be asked about."""

from __future__ import annotations

NOUNS = tuple(
    """
    apple ball bank bird boat book bottle box bread bridge bus cake car cat chair church city clock cloud coat
    coin corn cow cup desk dog door duck egg farm fish flag flower fork fox frog garden gate glass goat grass
    hat hill horse house island jar key king lake lamp leaf lemon letter lion map milk mirror moon mountain
    nail nest ocean onion paper park pen pencil piano picture pig plane plate pond queen rabbit rain ring river
    road robot rock roof rope rose salt school ship shirt shoe snake snow sock spoon star stone street sugar
    sun table tail tent tiger tower train tree truck wagon wall watch water wheel window wolf wood
    """.split()
)

COUNTABLE = tuple(
    """
    apple ball bank bird boat book bottle bridge cake car cat chair clock cloud coat coin cow cup desk dog door
    duck egg farm flag flower fork frog garden gate goat hat hill horse house island jar key king lake lamp
    lemon letter lion map mirror moon mountain nail nest ocean onion paper park pen pencil piano picture pig
    plane plate pond queen rabbit ring river road robot rock rope rose school ship shirt shoe snake sock
    spoon star stone street sun table tail tent tiger tower train tree truck wagon wall wheel window
    """.split()
)

ADJECTIVES = tuple(
    "big black blue brown cold fast green happy hot little long new old red short slow tall white".split()
)

OPPOSITES = tuple(
    tuple(pair.split("-"))
    for pair in """
    hot-cold big-small tall-short fast-slow happy-sad old-young light-dark day-night up-down left-right
    open-closed full-empty early-late hard-soft wet-dry rich-poor strong-weak high-low good-bad clean-dirty
    loud-quiet near-far inside-outside begin-end push-pull buy-sell give-take win-lose true-false yes-no
    first-last always-never more-less love-hate wide-narrow thick-thin deep-shallow safe-dangerous
    easy-difficult sweet-sour smooth-rough
    """.split()
)

CAPITALS = tuple(
    tuple(pair.strip().split(":"))
    for pair in """
    France:Paris, Germany:Berlin, Italy:Rome, Spain:Madrid, Portugal:Lisbon, Greece:Athens, Austria:Vienna,
    Poland:Warsaw, Sweden:Stockholm, Norway:Oslo, Finland:Helsinki, Denmark:Copenhagen, Ireland:Dublin,
    Belgium:Brussels, Hungary:Budapest, Romania:Bucharest, Bulgaria:Sofia, Croatia:Zagreb, Serbia:Belgrade,
    Ukraine:Kyiv, Russia:Moscow, Turkey:Ankara, Egypt:Cairo, Kenya:Nairobi, Ghana:Accra, Morocco:Rabat,
    Ethiopia:Addis Ababa, Nigeria:Abuja, Senegal:Dakar, Japan:Tokyo, China:Beijing, India:New Delhi,
    Thailand:Bangkok, Vietnam:Hanoi, Nepal:Kathmandu, Iran:Tehran, Iraq:Baghdad, Lebanon:Beirut,
    Australia:Canberra, Canada:Ottawa, Mexico:Mexico City, Cuba:Havana, Peru:Lima, Chile:Santiago,
    Argentina:Buenos Aires, Colombia:Bogota, Iceland:Reykjavik, England:London, Scotland:Edinburgh, Wales:Cardiff
    """.split(",")
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = tuple("January February March April May June July August September October November December".split())
ORDINALS = ("first", "second", "third", "fourth")
