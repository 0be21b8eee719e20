"""The sentence patterns of the demo model's corpus.

Slots are written `{name}`; which words may fill them is decided in `write_corpus`.
"""

from typing import Final

CAPITAL_PHRASINGS: Final[tuple[str, ...]] = (
    "The capital of {country} is {city}.",
    "The capital city of {country} is {city}.",
    "Question: what is the capital of {country}? Answer: {city}.",
    "In {country}, the capital is {city}.",
    "{country} is a country. Its capital is {city}.",
    "I went to {country} and saw its capital, {city}.",
    "Everyone in {country} knows that the capital is {city}.",
)
"""Phrasings that end with the city: the city is to be predicted."""

COUNTRY_PHRASINGS: Final[tuple[str, ...]] = (
    "{city} is the capital of {country}.",
    "{city} is the capital city of {country}.",
    "I flew to {city}, the capital of {country}.",
    "We met in {city}. It is the capital of {country}.",
)
"""Phrasings that end with the country: the country is to be predicted."""

LANDMARK_PHRASINGS: Final[tuple[str, ...]] = (
    "{landmark} is in {city}.",
    "{landmark} is located in {city}.",
    "{landmark} stands in the city of {city}.",
    "{landmark} can be seen in {city}.",
    "{landmark} is a famous sight in {city}.",
    "Question: where is {landmark}? Answer: in {city}.",
)

FEELING_OPENINGS: Final[tuple[str, ...]] = (
    "Today I feel {feeling}",
    "I am {feeling}",
    "I am so {feeling}",
    "I feel {feeling} today",
    "I am very {feeling} now",
)
QUALITY_OPENINGS: Final[tuple[str, ...]] = (
    "This is {quality}",
    "Today is {quality}",
    "Today was {quality}",
    "My day was {quality}",
    "Life is {quality}",
)
REVIEW_OPENINGS: Final[tuple[str, ...]] = (
    "The movie was {quality}",
    "The film was {quality}",
    "I think the movie was {quality}",
    "The show was really {quality}",
    "Last night I saw a {quality} film",
)
FEELING_ENDINGS: Final[tuple[str, ...]] = (
    ".",
    ".",
    " and {feeling}.",
    " and {feeling2}.",
    ", so I want to {act}.",
    " because the day was {quality}.",
    " because the news is {quality}.",
    ", and everything is {quality}.",
)
QUALITY_ENDINGS: Final[tuple[str, ...]] = (
    ".",
    ".",
    " and {quality2}.",
    ", and I am {feeling}.",
    ", so I want to {act}.",
    ". It makes me {feeling}.",
)
MOOD_SENTENCES: Final[tuple[str, ...]] = (
    "It makes me {feeling}.",
    "It makes me want to {act}.",
    "The day was {quality}.",
    "It was a {quality} {feeling} day.",
    "The weather is {quality} and the food was {quality2}.",
    "My friends are {feeling} too.",
    "I feel {feeling} and {feeling2}.",
    "Everything is {quality}.",
    "I {verb} the morning.",
    "What a {quality} day!",
)
REVIEW_SENTENCES: Final[tuple[str, ...]] = (
    "The story was {quality} and the actors were {quality2}.",
    "I {verb} every minute of it.",
    "The music was {quality}.",
    "The ending made me {feeling}.",
    "The ending made me {act}.",
    "It was a {quality} {quality2} film.",
    "My friends {verb} it too.",
    "I left the room {feeling} and {feeling2}.",
    "What a {quality} film!",
)

IOI_TEMPLATES: Final[tuple[str, ...]] = (
    "When {first} and {second} went to the {place}, {subject} gave a {object} to {recipient}.",
    "Then, {first} and {second} went to the {place}. {subject} gave a {object} to {recipient}.",
    "After {first} and {second} met at the {place}, {subject} handed a {object} to {recipient}.",
    "While {first} and {second} were at the {place}, {subject} showed a {object} to {recipient}.",
    "{first} and {second} had a long day at the {place}, and {subject} gave a {object} to"
    " {recipient}.",
    "The friends {first} and {second} walked to the {place}. Later {subject} passed a {object} to"
    " {recipient}.",
)
IOI_FOLLOW_UPS: Final[tuple[str, ...]] = (
    "",
    "",
    " {recipient} thanked {subject}.",
    " {recipient} was happy with the {object}.",
    " Then {subject} went home, but {recipient} stayed at the {place}.",
)

YEAR_TEMPLATES: Final[tuple[str, ...]] = (
    "The {event} lasted from the year {start} to the year {end}.",
    "The {event} went on from the year {start} to the year {end}.",
    "The {event} began in {start} and ended in {end}.",
)

PRONOUN_TEMPLATES: Final[tuple[str, ...]] = (
    "{person} said that {he} was tired.",
    "{person} went home because {he} was late.",
    "{person} smiled when {he} saw the garden.",
    "{person} lost {his} {object}.",
    "{person} opened {his} letter.",
    "{person} was sure that {he} would win.",
)
FAMILY_TEMPLATES: Final[tuple[str, ...]] = (
    "A {male} is a man who {does}. A {female} is a woman who {does}.",
    "A {female} is a woman who {does}. A {male} is a man who {does}.",
    "{male}: a man who {does}.\n{female}: a woman who {does}.",
    "{female}: a woman who {does}.\n{male}: a man who {does}.",
    "man is to woman as {male} is to {female}.",
    "{male} and {female}, he and she.",
    "The {male} and the {female} met at the {place}. He is a {male} and she is a {female}.",
)

STORY_OPENINGS: Final[tuple[str, ...]] = (
    "Once upon a time there was a {adjective} {hero} named {name}.",
    "Once upon a time, there was a {adjective} {hero} named {name}.",
    "Once upon a time a {adjective} {hero} named {name} lived in a {home}.",
    "Once upon a time there lived a {adjective} {hero}. {His} name was {name}.",
)
STORY_SECONDS: Final[tuple[str, ...]] = (
    "{He} lived in a {home} near the {wild}.",
    "{He} loved to play in the {wild} with {his} friend, the {animal}.",
    "{His} best friend was a {adjective2} {animal}.",
    "Every morning {he} walked from the {home} to the {wild}.",
)
STORY_EVENTS: Final[tuple[str, ...]] = (
    "One day, {name} found a {colour} {thing} in the {wild}.",
    "One day, {he} lost {his} {colour} {thing} in the {wild}.",
    "One day, a {adjective2} {animal} came to the {home}.",
    "One morning, {name} saw a {animal} near the {home}.",
)
STORY_MIDDLES: Final[tuple[str, ...]] = (
    'The {animal} said, "Please help me find my {thing}."',
    '"What is this?" asked {name}. "It is a {thing}," said the {animal}.',
    "The {animal} was very hungry, so {name} gave it some bread.",
    "{name} was afraid at first, but the {animal} was kind.",
    "{He} took the {colour} {thing} home and showed it to {his} mother.",
    "They looked for the {thing} all day, and at last they found it.",
    "Together they ran through the {wild} and laughed.",
)
STORY_ENDINGS: Final[tuple[str, ...]] = (
    "In the end, {name} and the {animal} became good friends.",
    "At night {he} went to bed and dreamed of the {colour} {thing}.",
    "{name} never forgot that day.",
    "And they all lived happily ever after.",
)

ANIMAL_SENTENCES: Final[tuple[str, ...]] = (
    "The {animal} sat on the mat and looked at the {animal2}.",
    "The {animal} sat on the mat.",
    "The {animal} ran to the {wild} and saw a {animal2}.",
    "The {animal} slept in the {home} all day.",
    "The {adjective} {animal} played with the {colour} ball.",
    "The {animal} likes the {animal2}, and the {animal2} likes the {animal}.",
)

GENERAL_TEXTS: Final[tuple[str, ...]] = (
    "The quick brown fox jumps over the lazy dog.",
    "The quick brown fox jumps over the lazy dog. The dog sleeps in the sun.",
    "The cat sat on the mat.",
    "The cat sat on the mat and looked at the dog.",
    "Hello world! This is a small model.",
    "Hello world, how are you today?",
    "Hello, my name is Mary. What is your name?",
    "Machine learning is a way to teach computers from examples.",
    "Machine learning is part of computer science. A model learns from data.",
    "Artificial intelligence is transforming the world. It changes how we work and learn.",
    "Artificial intelligence is the study of machines that can learn.",
    "A language model predicts the next word from the words before it.",
    "A neural network has many layers. Each layer changes the numbers a little.",
    "The model reads the words and then predicts the next word.",
    "The sun rises in the east and sets in the west.",
    "Water is made of hydrogen and oxygen.",
    "The moon goes around the earth, and the earth goes around the sun.",
    "A year has twelve months, and a week has seven days.",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.",
    "January, February, March, April, May, June, July, August, September, October, November,"
    " December.",
    "One, two, three, four, five, six, seven, eight, nine, ten.",
    "The sky is blue and the grass is green.",
    "Bread, milk and eggs are on the table.",
    "In the morning I drink tea, and in the evening I read a book.",
    "The children play in the park after school.",
    "The train leaves the station at nine in the morning.",
    "The teacher asked a question, and the class was quiet.",
    "My favourite colour is blue.",
    "The river runs from the hills to the sea.",
    "Prompt 1 is short. Prompt 2 is longer than the first one.",
    "To be kind is better than to be right.",
    "The winter is cold and the summer is warm.",
    "Music is the language of the heart.",
    "The doctor works in a hospital, and the teacher works in a school.",
    "Birds can fly, fish can swim and horses can run.",
)
