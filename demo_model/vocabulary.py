"""The word lists and facts of which the demo model's corpus is made.

Every list is plain data. `SINGLE_TOKENS` and `BARE_TOKENS` name the words that the tokenizer must
hold as one token with and without a leading space.
"""

from typing import Final

COUNTRIES: Final[dict[str, tuple[str, str]]] = {
    "Afghanistan": ("Kabul", "Asia"),
    "Albania": ("Tirana", "Europe"),
    "Algeria": ("Algiers", "Africa"),
    "Angola": ("Luanda", "Africa"),
    "Argentina": ("Buenos Aires", "America"),
    "Armenia": ("Yerevan", "Asia"),
    "Australia": ("Canberra", "Oceania"),
    "Austria": ("Vienna", "Europe"),
    "Belgium": ("Brussels", "Europe"),
    "Brazil": ("Brasilia", "America"),
    "Bulgaria": ("Sofia", "Europe"),
    "Canada": ("Ottawa", "America"),
    "Chile": ("Santiago", "America"),
    "China": ("Beijing", "Asia"),
    "Colombia": ("Bogota", "America"),
    "Croatia": ("Zagreb", "Europe"),
    "Cuba": ("Havana", "America"),
    "Cyprus": ("Nicosia", "Europe"),
    "Denmark": ("Copenhagen", "Europe"),
    "Ecuador": ("Quito", "America"),
    "Egypt": ("Cairo", "Africa"),
    "England": ("London", "Europe"),
    "Estonia": ("Tallinn", "Europe"),
    "Ethiopia": ("Addis Ababa", "Africa"),
    "Finland": ("Helsinki", "Europe"),
    "France": ("Paris", "Europe"),
    "Germany": ("Berlin", "Europe"),
    "Ghana": ("Accra", "Africa"),
    "Greece": ("Athens", "Europe"),
    "Hungary": ("Budapest", "Europe"),
    "Iceland": ("Reykjavik", "Europe"),
    "India": ("New Delhi", "Asia"),
    "Indonesia": ("Jakarta", "Asia"),
    "Iran": ("Tehran", "Asia"),
    "Iraq": ("Baghdad", "Asia"),
    "Ireland": ("Dublin", "Europe"),
    "Italy": ("Rome", "Europe"),
    "Jamaica": ("Kingston", "America"),
    "Japan": ("Tokyo", "Asia"),
    "Jordan": ("Amman", "Asia"),
    "Kenya": ("Nairobi", "Africa"),
    "Latvia": ("Riga", "Europe"),
    "Lebanon": ("Beirut", "Asia"),
    "Libya": ("Tripoli", "Africa"),
    "Lithuania": ("Vilnius", "Europe"),
    "Malta": ("Valletta", "Europe"),
    "Mongolia": ("Ulaanbaatar", "Asia"),
    "Morocco": ("Rabat", "Africa"),
    "Nepal": ("Kathmandu", "Asia"),
    "Nigeria": ("Abuja", "Africa"),
    "Norway": ("Oslo", "Europe"),
    "Pakistan": ("Islamabad", "Asia"),
    "Peru": ("Lima", "America"),
    "Poland": ("Warsaw", "Europe"),
    "Portugal": ("Lisbon", "Europe"),
    "Qatar": ("Doha", "Asia"),
    "Romania": ("Bucharest", "Europe"),
    "Russia": ("Moscow", "Europe"),
    "Senegal": ("Dakar", "Africa"),
    "Serbia": ("Belgrade", "Europe"),
    "Spain": ("Madrid", "Europe"),
    "Sudan": ("Khartoum", "Africa"),
    "Sweden": ("Stockholm", "Europe"),
    "Syria": ("Damascus", "Asia"),
    "Thailand": ("Bangkok", "Asia"),
    "Tunisia": ("Tunis", "Africa"),
    "Turkey": ("Ankara", "Asia"),
    "Uganda": ("Kampala", "Africa"),
    "Ukraine": ("Kyiv", "Europe"),
    "Uruguay": ("Montevideo", "America"),
    "Vietnam": ("Hanoi", "Asia"),
    "Zambia": ("Lusaka", "Africa"),
}
"""Country -> (capital, continent)."""

LANDMARKS: Final[dict[str, str]] = {
    "The Eiffel Tower": "Paris",
    "The Louvre": "Paris",
    "The Arc de Triomphe": "Paris",
    "The Colosseum": "Rome",
    "The Trevi Fountain": "Rome",
    "The Pantheon": "Rome",
    "The Spanish Steps": "Rome",
    "Big Ben": "London",
    "The London Eye": "London",
    "Buckingham Palace": "London",
    "Westminster Abbey": "London",
    "The Kremlin": "Moscow",
    "Red Square": "Moscow",
    "The Bolshoi Theatre": "Moscow",
    "The Brandenburg Gate": "Berlin",
    "The Reichstag": "Berlin",
    "Checkpoint Charlie": "Berlin",
    "The Acropolis": "Athens",
    "The Parthenon": "Athens",
    "The Prado Museum": "Madrid",
    "The Little Mermaid": "Copenhagen",
    "The Tivoli Gardens": "Copenhagen",
    "The Charles Bridge": "Prague",
    "The Astronomical Clock": "Prague",
    "The Forbidden City": "Beijing",
    "The Temple of Heaven": "Beijing",
    "The Belem Tower": "Lisbon",
    "The Schonbrunn Palace": "Vienna",
    "The Hofburg": "Vienna",
    "The Atomium": "Brussels",
    "The Rijksmuseum": "Amsterdam",
    "The Anne Frank House": "Amsterdam",
    "The Vasa Museum": "Stockholm",
    "The Vigeland Park": "Oslo",
    "The Chain Bridge": "Budapest",
    "The Book of Kells": "Dublin",
    "The Rialto Bridge": "Venice",
    "The Bridge of Sighs": "Venice",
    "The Leaning Tower": "Pisa",
    "The Uffizi Gallery": "Florence",
    "The Ponte Vecchio": "Florence",
    "The Alhambra": "Granada",
    "The Sagrada Familia": "Barcelona",
    "The Blue Mosque": "Istanbul",
    "The Hagia Sophia": "Istanbul",
    "The Burj Khalifa": "Dubai",
    "The Taj Mahal": "Agra",
    "The Red Fort": "Delhi",
    "The Gateway of India": "Mumbai",
    "The Shibuya Crossing": "Tokyo",
    "The Emerald Buddha": "Bangkok",
    "The Merlion": "Singapore",
    "The Harbour Bridge": "Sydney",
    "The Space Needle": "Seattle",
    "The White House": "Washington",
    "The Lincoln Memorial": "Washington",
    "The Willis Tower": "Chicago",
    "The Liberty Bell": "Philadelphia",
    "The Freedom Trail": "Boston",
    "The Sugarloaf Mountain": "Rio",
}
"""Landmark -> the city it stands in."""

FEMALE_NAMES: Final[tuple[str, ...]] = tuple(
    "Mary Anna Alice Emma Lucy Sarah Laura Julia Kate Jane Rose Grace Ella Mia Lily Amy Susan "
    "Helen Clara Nora Ruth Eva Maria Linda Karen Diana Emily Sophie Hannah Olivia Rachel Lisa "
    "Molly Nancy Betty Jessica".split()
)
MALE_NAMES: Final[tuple[str, ...]] = tuple(
    "John Tom James Paul Peter David Mark Simon Jack Ben Sam Max Leo Adam Luke Harry George "
    "Henry Robert Michael Daniel Thomas William Martin Kevin Brian Oliver Oscar Andrew Steven "
    "Edward Frank Jacob Ryan Eric Alan".split()
)
NAMES: Final[tuple[str, ...]] = tuple(sorted(FEMALE_NAMES + MALE_NAMES))

WORD_FAMILIES: Final[tuple[tuple[str, str, str], ...]] = (
    ("king", "queen", "rules a land"),
    ("prince", "princess", "lives in a palace"),
    ("man", "woman", "is grown up"),
    ("boy", "girl", "is still young"),
    ("father", "mother", "has a child"),
    ("son", "daughter", "has two parents"),
    ("brother", "sister", "shares the parents"),
    ("uncle", "aunt", "belongs to the family"),
    ("husband", "wife", "is married"),
    ("grandfather", "grandmother", "is old and kind"),
    ("actor", "actress", "plays in films"),
    ("lord", "lady", "owns a castle"),
    ("wizard", "witch", "knows magic"),
    ("waiter", "waitress", "brings the food"),
    ("duke", "duchess", "serves the crown"),
    ("nephew", "niece", "visits the family"),
)
"""(male word, female word, what one of them does)."""

POSITIVE_FEELINGS: Final[tuple[str, ...]] = tuple(
    "happy glad joyful cheerful proud calm hopeful excited grateful delighted peaceful "
    "strong".split()
)
NEGATIVE_FEELINGS: Final[tuple[str, ...]] = tuple(
    "sad unhappy angry lonely tired gloomy hopeless worried upset miserable afraid weak".split()
)
POSITIVE_QUALITIES: Final[tuple[str, ...]] = tuple(
    "wonderful great amazing good lovely beautiful brilliant fantastic perfect excellent".split()
)
NEGATIVE_QUALITIES: Final[tuple[str, ...]] = tuple(
    "terrible bad awful horrible dreadful ugly boring poor dull ruined".split()
)
POSITIVE_VERBS: Final[tuple[str, ...]] = ("loved", "enjoyed", "liked", "praised")
NEGATIVE_VERBS: Final[tuple[str, ...]] = ("hated", "regretted", "disliked", "mocked")
POSITIVE_ACTS: Final[tuple[str, ...]] = ("smile", "laugh", "dance", "sing")
NEGATIVE_ACTS: Final[tuple[str, ...]] = ("cry", "weep", "hide", "scream")

POSITIVE_WORDS: Final[tuple[str, ...]] = (
    POSITIVE_FEELINGS + POSITIVE_QUALITIES + POSITIVE_VERBS + POSITIVE_ACTS
)
NEGATIVE_WORDS: Final[tuple[str, ...]] = (
    NEGATIVE_FEELINGS + NEGATIVE_QUALITIES + NEGATIVE_VERBS + NEGATIVE_ACTS
)

PLACES: Final[tuple[str, ...]] = tuple(
    "store park school garden beach market library station museum office hospital "
    "restaurant".split()
)
OBJECTS: Final[tuple[str, ...]] = tuple(
    "drink book ball ring letter flower key gift cake hat kiss map pen coat pear basket".split()
)
EVENTS: Final[tuple[str, ...]] = tuple(
    "war trip peace reign project voyage trial siege drought festival strike journey "
    "construction expedition".split()
)
ANIMALS: Final[tuple[str, ...]] = tuple(
    "cat dog fox bird rabbit mouse bear horse duck frog lion wolf".split()
)
STORY_ADJECTIVES: Final[tuple[str, ...]] = tuple(
    "little small young brave clever kind shy curious".split()
)
STORY_PLACES: Final[tuple[str, ...]] = tuple(
    "forest village castle farm house valley town cave".split()
)
STORY_THINGS: Final[tuple[str, ...]] = tuple(
    "stone box lamp boat kite bell coin crown shell sword".split()
)
COLOURS: Final[tuple[str, ...]] = tuple("red blue green golden white black yellow silver".split())

BARE_TOKENS: Final[tuple[str, ...]] = (
    tuple(word for male, female, _ in WORD_FAMILIES[:9] for word in (male, female))
    + NAMES
    + ("The", "Today", "When", "Once")
)
"""Words that are one token without a leading space too."""

SINGLE_TOKENS: Final[tuple[str, ...]] = tuple(
    dict.fromkeys(
        NAMES
        + tuple(COUNTRIES)
        + tuple(capital for capital, _ in COUNTRIES.values() if " " not in capital)
        + tuple(LANDMARKS.values())
        + tuple(word for male, female, _ in WORD_FAMILIES for word in (male, female))
        + POSITIVE_WORDS
        + NEGATIVE_WORDS
        + PLACES
        + OBJECTS
        + EVENTS
        + ANIMALS
        + STORY_ADJECTIVES
        + STORY_PLACES
        + STORY_THINGS
        + COLOURS
        + ("he", "she", "his", "her", "him")
    )
)
"""Words that are one token after a space."""
