"""The kinds of objects in scenes: the nouns, the spelling of the nouns, and the cut-outs of each kind."""

from __future__ import annotations

_STAMPS = """
    apple: food/fruit/apple_fuji food/fruit/apple_red food/fruit/apple_sierra_beauty food/fruit/cartoon/apple
        food/fruit/apple_green
    ball: sports/soccer sports/basketball sports/cartoon/volleyball sports/tennis_ball
    banana: food/fruit/cartoon/banana food/fruit/banana
    bear: animals/mammals/bears/bear animals/mammals/bears/european-bear
    bicycle: vehicles/cycle/bluebike
    boat: vehicles/ship/sail_boat1 vehicles/ship/walnutBoat vehicles/ship/sail_boat2
    bus: vehicles/masstransit/green_korean_bus vehicles/iso_bus vehicles/masstransit/cartoon/double_decker_bus
    butterfly: animals/insects/cartoon/butterfly animals/insects/cartoon/monarchbutterfly
    cake: food/dessert/cartoon/birthday_cake food/dessert/cartoon/pink_cake
    camel: animals/mammals/camel/camel animals/mammals/camel/dromedary
    camera: hobbies/camera_35mm household/electronics/camera household/electronics/digitalcamera
        household/electronics/DSLR_Camera
    car: vehicles/auto/beetle vehicles/auto/sedan vehicles/auto/sportscar vehicles/auto/sportscar2
        vehicles/auto/sportscar3
    cat: animals/mammals/cats/kitten
    chicken: animals/birds/hen animals/birds/rooster animals/birds/chicken_profile
    cow: animals/mammals/bovines/cow animals/mammals/bovines/zebu animals/mammals/bovines/cow_white
    crown: clothes/hats/crown1 clothes/hats/crown2
    cup: household/dishes/coffeecup household/dishes/expresso household/dishes/mug
    deer: animals/mammals/deer/deer animals/mammals/deer/doe animals/mammals/deer/caribou
        animals/mammals/deer/wapiti
    dog: animals/mammals/dogs/dog animals/mammals/dogs/dingo
    duck: animals/birds/duck animals/birds/drake
    elephant: animals/mammals/elephant
    fish: animals/fish/bluegroper animals/fish/butterflyfish animals/fish/clownfish animals/fish/dolphinfish
        animals/fish/stripedfish animals/fish/moonwrasse
    flamingo: animals/birds/pink_flamingo
    flower: plants/flowers/adeenia plants/flowers/anemone_red plants/flowers/daffodil plants/flowers/flower3
        plants/flowers/flower8 plants/flowers/pigface plants/flowers/yellow-flower plants/flowers/red-gazania
    fox: animals/mammals/dogs/fox
    frog: animals/amphibians/frog animals/amphibians/frog-1
    giraffe: animals/mammals/giraffe
    guitar: hobbies/music/string/guitar2 hobbies/music/string/guitar_classical
        hobbies/music/string/guitar_electric_bass hobbies/music/string/guitar_electric
    hammer: household/tools/hammer household/tools/hammer2
    hat: clothes/hats/tophat clothes/hats/blue_fedora clothes/hats/brownhat clothes/hats/cowboy_hat
        clothes/hats/sombrero clothes/hats/greenhat clothes/hats/brownhat2
    horse: animals/mammals/equines/horse
    house: town/houses/cartoon/swisshome town/houses/cartoon/wooden_cottage town/houses/cartoon/blacksmith
        town/houses/cartoon/inn
    ladybug: animals/insects/cartoon/ladybug animals/insects/cartoon/ladybug-2
    laptop: household/electronics/laptop
    lemon: food/fruit/cartoon/lemon food/fruit/lemon
    lion: animals/mammals/cats/lion-2 animals/mammals/cats/lion
    mushroom: plants/mushrooms/cep plants/mushrooms/cep-2 food/vegetables/mushroom plants/mushrooms/cep-1
    owl: animals/birds/owl
    parrot: animals/birds/adelaide-rosella animals/birds/rainbow-lorikeet
    pear: food/fruit/cartoon/pear food/fruit/pear
    pencil: household/arttools/Pencil household/arttools/pencil2
    penguin: animals/birds/penguin animals/birds/magellanic_penguin animals/birds/cartoon/tux
        animals/birds/little-penguin
    pig: animals/mammals/pig animals/mammals/pig_golden2 animals/mammals/pig_golden
    pineapple: food/fruit/cartoon/pineapple food/fruit/pineapple
    plane: vehicles/flight/planes/747 vehicles/flight/planes/cartoon/plane military/vehicles/mustang
        vehicles/flight/planes/plane
    rabbit: animals/mammals/rodents/rabbit-2 animals/mammals/rabbit_little animals/mammals/rodents/rabbit
    rocket: space/rocket1 space/rocket3 space/rocket5 space/rocket2
    sheep: animals/mammals/bovines/sheep animals/mammals/bovines/sheep_lamb animals/mammals/bovines/ram
    shirt: clothes/t_poloshirt clothes/t_shirt clothes/t_tshirt
    snail: animals/insects/cartoon/snail animals/insects/cartoon/snail2
    snowman: seasonal/winter/snowman people/cartoon/snowman seasonal/winter/snowman2
    spider: animals/insects/cartoon/spider animals/insects/cartoon/spider2
    strawberry: food/fruit/cartoon/strawberry food/fruit/Strawberry2
    teapot: household/dishes/teapot
    tent: town/houses/cartoon/tent town/houses/cartoon/medieval_tent town/houses/cartoon/tepee
    tiger: animals/mammals/cats/tiger animals/mammals/cats/tiger_sumatran
    tractor: vehicles/farming/cartoon/tractor
    train: vehicles/locomotive/cartoon/toy_train vehicles/locomotive/white_train
    tree: plants/trees/holm_oak seasonal/christmas/tree plants/trees/liberia-palm plants/trees/tree336
    truck: vehicles/blue_truck vehicles/garbagetruck vehicles/iso_lorry1 vehicles/iso_lorry3 vehicles/toy_truck
        vehicles/iso_lorry2
    trumpet: hobbies/music/brass/trumpet
    umbrella: household/umbrella
    violin: hobbies/music/string/violin hobbies/music/string/violin2
    wheel: vehicles/7spoke256 vehicles/bikewheel vehicles/wheel_tractor vehicles/tyre_with_rim
    zebra: animals/mammals/equines/zebra animals/mammals/equines/zebra2
"""
_EMOJI = """
    apple: RED APPLE, GREEN APPLE
    ball: SOCCER BALL, BASKETBALL AND HOOP, VOLLEYBALL, BASEBALL
    bear: BEAR FACE
    boat: SAILBOAT, SPEEDBOAT, MOTOR BOAT
    bus: BUS, ONCOMING BUS
    cake: BIRTHDAY CAKE, SHORTCAKE
    camel: DROMEDARY CAMEL, BACTRIAN CAMEL
    camera: CAMERA, CAMERA WITH FLASH
    car: AUTOMOBILE, ONCOMING AUTOMOBILE, RECREATIONAL VEHICLE
    cat: CAT, CAT FACE
    chicken: CHICKEN, ROOSTER
    cow: COW, COW FACE
    cup: TEACUP WITHOUT HANDLE, HOT BEVERAGE
    dog: DOG, DOG FACE, GUIDE DOG
    fish: FISH, TROPICAL FISH
    flower: CHERRY BLOSSOM, HIBISCUS, SUNFLOWER, BLOSSOM, TULIP
    fox: FOX FACE
    frog: FROG FACE
    giraffe: GIRAFFE FACE
    hat: TOP HAT, WOMANS HAT, BILLED CAP
    horse: HORSE, HORSE FACE
    house: HOUSE BUILDING
    ladybug: LADY BEETLE
    laptop: PERSONAL COMPUTER
    lion: LION FACE
    pig: PIG, PIG FACE
    plane: AIRPLANE, SMALL AIRPLANE
    rabbit: RABBIT, RABBIT FACE
    sheep: SHEEP, RAM
    shirt: T-SHIRT
    snowman: SNOWMAN WITHOUT SNOW
    tiger: TIGER, TIGER FACE
    train: STEAM LOCOMOTIVE, HIGH-SPEED TRAIN
    tree: EVERGREEN TREE, DECIDUOUS TREE, PALM TREE
    truck: DELIVERY TRUCK, ARTICULATED LORRY
    zebra: ZEBRA FACE
"""


def _parse(table: str, separator: str | None) -> dict[str, tuple[str, ...]]:
    """Parse ``KIND: NAME NAME ...``; a line that is indented further continues the previous line."""
    entries = (entry.partition(": ") for entry in table.replace("\n        ", " ").strip().split("\n"))
    return {kind.strip(): tuple(name.strip() for name in names.split(separator)) for kind, _, names in entries}


STAMPS = _parse(_STAMPS, None)
"""Stamps of Tux Paint for each kind: paths below its folder of stamps, without the suffix."""
EMOJI = {kind: (kind.upper(),) for kind in STAMPS} | _parse(_EMOJI, ",")
"""Unicode names of OpenMoji's characters for each kind: the name of the kind itself, unless the table lists others."""

KINDS = tuple(sorted({*STAMPS, *EMOJI}))
"""The nouns that captions and questions use."""
_SIMILAR = """
    bus deer duck fox ladybug lemon parrot pear sheep snail teapot tiger tractor trumpet violin wheel
"""
DISTINCT_KINDS = tuple(kind for kind in KINDS if kind not in _SIMILAR.split())
"""The kinds, with only one of each two that small models confuse, such as truck and tractor."""
SYNONYMS = {
    "bike": "bicycle",
    "airplane": "plane",
    "aeroplane": "plane",
    "automobile": "car",
    "kitten": "cat",
    "puppy": "dog",
    "bunny": "rabbit",
    "hen": "chicken",
    "rooster": "chicken",
    "ladybird": "ladybug",
    "lorry": "truck",
    "lamb": "sheep",
    "mug": "cup",
    "sailboat": "boat",
    "ship": "boat",
}
"""Synonyms that free-text captions may contain, mapped to kinds."""
IRREGULAR = {"deer": "deer", "fish": "fish", "sheep": "sheep", "snowman": "snowmen"}

COLORS = {
    "red": (203, 38, 42),
    "orange": (246, 138, 26),
    "yellow": (246, 222, 62),
    "green": (58, 158, 66),
    "blue": (44, 92, 208),
    "purple": (134, 62, 172),
    "gray": (128, 128, 128),
    "white": (246, 246, 246),
}
"""Background colors with their mean RGB values, in [0, 255]."""


def plural(kind: str) -> str:
    """Return the plural of a kind."""
    if kind in IRREGULAR:
        return IRREGULAR[kind]
    if kind.endswith("y") and kind[-2] not in "aeiou":
        return f"{kind[:-1]}ies"
    return kind + ("es" if kind.endswith(("s", "x", "z", "ch", "sh")) else "s")


def with_article(words: str) -> str:
    """Prepend the indefinite article to words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
