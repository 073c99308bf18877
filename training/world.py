#!/usr/bin/env python3
"""A small world told in plain English: stories with facts, and questions about what was said.

    python training/world.py show --kind qa --tokens 256 --seed 3
    python training/world.py evaluate demo-eval

Everything follows from a seed. Seeds below HELD_OUT are for training, the others for evaluation.
Names, places and wordings are shared by both; what is new in a held-out document is who did what.
README.md describes the files of `evaluate`.
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

HELD_OUT = 1 << 40  # the first seed of evaluation

BEGIN, END, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
KINDS = {"qa": 0.44, "coreference": 0.14, "passkey": 0.10, "story": 0.12, "chat": 0.20}
# Nothing but facts and questions about all of them. Where stories have few questions, a model learns to
# tell stories and never learns to look back; with these alone it does within a million tokens.
DENSE = "dense"
UNANSWERABLE = 0.3  # share of the questions
# And of those of dense documents: a model that can always say "unknown" is slow to learn to look back.
UNANSWERABLE_DENSE = 0.12
UNKNOWN = "unknown"


# ------------------------------------------------------------------------------ words

WOMEN = """Anna Maria Clara Emma Julia Laura Nora Olga Paula Rosa Sara Tina Vera Wendy Alice
Bella Diana Ella Freya Grace Helen Iris Jane Kate Lucy Mina""".split()
MEN = """Tom Ben Carl David Eric Frank George Henry Ivan Jack Karl Leo Max Noah Oscar Paul
Peter Ralf Sam Theo Victor Walter Adam Hugo Felix""".split()
PLACES = """Bergen Lisbon Vienna Dover Lagos Cairo Delhi Kyoto Lima Oslo Paris Rome Seville
Turin Utrecht Verona Warsaw York Zurich Athens Boston Denver Dublin Geneva""".split()
JOBS = """baker teacher doctor farmer painter sailor tailor gardener carpenter nurse driver
singer writer cook pilot dentist judge miner weaver librarian""".split()
COLOURS = "red blue green yellow black white brown purple orange pink grey golden".split()
OBJECTS = """ball book lamp key cup hat coat scarf ring bottle knife spoon mirror clock pencil
letter map flute drum kite candle brush rope bell coin stone blanket basin shell ribbon""".split()
CONTAINERS = "box basket drawer bag chest cupboard bucket suitcase jar barrel".split()
ANIMALS = "dog cat horse rabbit parrot goat pig duck turtle donkey".split()
PET_NAMES = """Rex Bella Milo Luna Toby Daisy Rocky Misty Simba Coco Shadow Pepper Biscuit
Ginger Smoky Patch Lucky Star Bruno Nala""".split()
PET_NAMES = [name for name in PET_NAMES if name not in WOMEN]
FOODS = """bread soup rice cheese honey fish pasta salad porridge cake beans stew yoghurt
pancakes noodles chocolate""".split()
THINGS = """apples pears plums eggs lemons onions carrots potatoes nails buttons candles
tomatoes cherries oranges mushrooms nuts""".split()
NUMBERS = """two three four five six seven eight nine ten eleven twelve fifteen twenty
thirty""".split()
SPOTS = """bridge market station harbour mill school church library park well""".split()
DEEDS = """dropped a cup of tea|laughed out loud|lost a glove|began to sing|fell asleep
|told a joke|found a feather|broke a plate|whistled a tune|caught a cold|missed the bus
|forgot an umbrella|picked some flowers|ate an ice cream|drew a picture|ran up the hill
|opened the window|paid the bill|called a taxi|wrote down a poem|swam in the lake
|climbed a tree|lit a fire|won the race""".replace("\n", "").split("|")
DEEDS = [deed.strip() for deed in DEEDS]


# ------------------------------------------------------------------------------ facts


@dataclass(frozen=True)
class Attribute:
    """What can be told of a person {n} (or {S}, "She", and {p}, "her"), said by that person, and
    asked. A question names the slot that answers it. The first `tell` is the answer of a chat."""

    draw: Callable[["Story"], dict[str, str]]
    tell: list[str]
    pronoun: list[str]
    speech: list[str]
    ask: list[tuple[str, str]]
    recap: list[str]  # what a story may come back to, once the fact was told


def a(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def draw_thing(story: "Story") -> dict[str, str]:
    colour, object_ = story.rng.choice(COLOURS), story.take(OBJECTS)
    return {"o": object_, "co": f"{colour} {object_}", "aco": a(f"{colour} {object_}")}


def draw_pet(story: "Story") -> dict[str, str]:
    rng = story.rng
    colour, animal = rng.choice(COLOURS), rng.choice(ANIMALS)
    return {"c": colour, "x": animal, "acx": a(f"{colour} {animal}"), "v": story.take(PET_NAMES)}


def draw_age(story: "Story") -> dict[str, str]:
    return {"v": str(story.rng.randint(18, 89))}


def draw_phone(story: "Story") -> dict[str, str]:
    return {"v": str(story.rng.randint(10000, 99999))}


def draw_job(story: "Story") -> dict[str, str]:
    job = story.take(JOBS)
    return {"v": job, "av": a(job)}


def draw_bought(story: "Story") -> dict[str, str]:
    return {"v": story.rng.choice(NUMBERS), "x": story.take(THINGS)}


def draw_put(story: "Story") -> dict[str, str]:
    return draw_thing(story) | {"v": story.rng.choice(CONTAINERS)}


def draw_relation(story: "Story") -> dict[str, str]:
    other = story.other()
    # Nothing symmetric, such as a sister: it would answer a question about the other one.
    word = story.rng.choice(["boss", "tutor", "aunt" if other in WOMEN else "uncle"])
    return {"m": other, "v": word, "av": a(word)}


ATTRIBUTES = {
    "home": Attribute(
        lambda s: {"v": s.take(PLACES)},
        ["{n} lives in {v}.", "{n} has a house in {v}.", "The home of {n} is in {v}."],
        ["{S} lives in {v}.", "{S} has a small house in {v}."],
        ["I live in {v}", "My house is in {v}"],
        [("Where does {n} live?", "v"), ("In which town does {n} live?", "v"), ("Who lives in {v}?", "n")],
        ["At the end of the day {n} went home to {v}.", "{n} took the road back to {v}."],
    ),
    "origin": Attribute(
        lambda s: {"v": s.take(PLACES)},
        ["{n} grew up in {v}.", "As a child {n} went to school in {v}."],
        ["{S} grew up in {v}.", "As a child {S_} went to school in {v}."],
        ["I grew up in {v}", "As a child I went to school in {v}"],
        [("Where did {n} grow up?", "v"), ("Who grew up in {v}?", "n")],
        ["{n} still thought of {v}, where {S_} grew up."],
    ),
    "job": Attribute(
        draw_job,
        ["{n} works as {av}.", "{n} is {av}.", "{n} has worked as {av} for years."],
        ["{S} is {av}.", "{S} works as {av}."],
        ["I am {av}", "I work as {av}"],
        [("What is the job of {n}?", "v"), ("What does {n} work as?", "v"), ("Who is {av}?", "n")],
        ["{n} was proud to be {av}.", "It is not always easy to be {av}, said {n}."],
    ),
    "pet": Attribute(
        draw_pet,
        ["{n} has {acx} named {v}.", "{n} owns {acx} called {v}."],
        ["{S} has {acx} named {v}.", "{S} owns {acx}, and its name is {v}."],
        ["I have {acx} named {v}", "At home I have {acx} called {v}"],
        [
            ("What animal does {n} have?", "x"),
            ("What is the name of the pet of {n}?", "v"),
            ("What colour is the pet of {n}?", "c"),
            ("Who has a pet named {v}?", "n"),
        ],
        ["In the evening {n} fed {v}, {p} {x}.", "{n} called {p} {x}, and {v} came at once."],
    ),
    "carries": Attribute(
        draw_thing,
        ["{n} carries {aco}.", "{n} always has {aco} with {q}.", "In the hand of {n} is {aco}."],
        ["{S} carries {aco}.", "{S} always has {aco} with {q}."],
        ["I carry {aco} with me", "I always have {aco} with me"],
        [("What does {n} carry?", "co"), ("Who carries the {co}?", "n")],
        ["{n} looked at the {co} for a while.", "{n} still had the {co}."],
    ),
    "age": Attribute(
        draw_age,
        ["{n} is {v} years old.", "{n} has turned {v} this year."],
        ["{S} is {v} years old."],
        ["I am {v} years old"],
        [("How old is {n}?", "v")],
        ["Nobody would believe that {n} is {v} years old."],
    ),
    "phone": Attribute(
        draw_phone,
        ["The telephone number of {n} is {v}.", "{n} has the telephone number {v}."],
        ["{P} telephone number is {v}.", "{S} has the telephone number {v}."],
        ["My telephone number is {v}"],
        [("What is the telephone number of {n}?", "v"), ("Who has the telephone number {v}?", "n")],
        ["Somebody dialled {v}, and {n} answered."],
    ),
    "bought": Attribute(
        draw_bought,
        ["{n} bought {v} {x}.", "{n} came home with {v} {x} from the shop."],
        ["{S} bought {v} {x}.", "At the shop {S_} paid for {v} {x}."],
        ["I bought {v} {x}"],
        [("How many {x} did {n} buy?", "v"), ("What did {n} buy?", "x"), ("Who bought the {x}?", "n")],
        ["{n} counted the {x}, and there were {v} of them."],
    ),
    "put": Attribute(
        draw_put,
        ["{n} put the {co} in the {v}.", "{n} hid the {co} in the {v}."],
        ["{S} put the {co} in the {v}.", "{S} left the {co} in the {v}."],
        ["I put the {co} in the {v}"],
        [
            ("Where did {n} put the {co}?", "v"),
            ("What did {n} put in the {v}?", "co"),
            ("Who put the {co} in the {v}?", "n"),
        ],
        [
            "Later {n} opened the {v} and took out the {co}.",
            "{n} wanted the {co} again, and found it in the {v}.",
        ],
    ),
    "gave": Attribute(
        lambda s: draw_thing(s) | {"m": s.other()},
        ["{n} gave the {co} to {m}.", "{n} sent the {co} to {m}."],
        ["{S} gave the {co} to {m}."],
        ["I gave the {co} to {m}"],
        [
            ("To whom did {n} give the {co}?", "m"),
            ("What did {n} give to {m}?", "co"),
            ("Who gave the {co} to {m}?", "n"),
        ],
        ["{m} thanked {n} for the {co}."],
    ),
    "relation": Attribute(
        draw_relation,
        ["The {v} of {n} is {m}.", "{n} has {av}, {m}."],
        ["{P} {v} is {m}."],
        ["My {v} is {m}"],
        [("Who is the {v} of {n}?", "m")],
        ["{n} talked for an hour with {m}, {p} {v}."],
    ),
    "food": Attribute(
        lambda s: {"v": s.take(FOODS)},
        ["{n} likes {v} best.", "The favourite food of {n} is {v}."],
        ["{S} likes {v} best.", "{P} favourite food is {v}."],
        ["I like {v} best", "My favourite food is {v}"],
        [("What food does {n} like best?", "v"), ("Who likes {v} best?", "n")],
        ["For dinner {n} had {v}, as always.", "{n} asked for {v} again."],
    ),
}

# Sentences that answer no question.
FILLER = """The wind came from the sea that day.|The sun was out, and the streets were warm.
|It rained for an hour, and then the sky was clear again.|A cart went slowly down the road.
|Somewhere a door closed.|The children played in the yard until it was dark.
|Nobody said much for a while.|The clock on the tower struck {number}.
|There was a smell of fresh paint near the {spot}.|The path to the {spot} was covered with leaves.
|An old man was sitting by the {spot}.|A bird sang on the roof of the {spot}.
|The shops were still open.|It was a quiet week in the valley.|The river was high after the rain.
|Snow lay on the hills.|People were talking about the weather.|The train was late again.
|Two boats left the harbour in the morning.|The grass behind the {spot} was tall.
|A light was burning in the window of the {spot}.|The news came late, as it often does.
|On the wall there was a picture of a ship.|The summer had been long and dry.
|The bells could be heard from far away.|There were clouds over the mountains.
|Someone had left a chair in front of the {spot}.|The water in the well was cold and clear.
|It was too early to eat and too late to sleep.|The road goes past the {spot} and over a hill.
|{n} looked out of the window.|{n} walked slowly along the river.|{n} waited near the {spot}.
|{n} did not want to talk about it.|{n} smiled and said nothing.|{n} slept badly that night.
|{n} listened to the rain.|{n} and {m} met at the {spot}.|{n} waved to {m} from the {spot}.
|{n} asked {m} about the weather.|{n} was in a good mood.|{n} was thinking of the old days.
|{n} sat down for a moment.|{n} and {m} had known each other for years.
|"It will be cold tomorrow," said {n}.|"We should go soon," said {n} to {m}.
|"What a day," said {n}.|{n} stopped at the {spot} to rest.|{n} washed the dishes.
|{n} was late that day, and {m} had to wait.""".replace("\n", "").split("|")

OPENINGS = [
    "This is the story of {names}.",
    "Here is what is known about {names}.",
    "This was written about {names}.",
    "{names} knew each other well.",
    "Once there were {count} people, {names}.",
]
DAY = """In the morning|At noon|In the afternoon|On Monday|On Tuesday|On Wednesday|On Thursday
|On Friday|On Saturday|On Sunday|The next day|A week later|That evening""".replace("\n", "").split("|")
HINTS = ["It was", "Nobody but", "So much about"]  # before a name: whoever was just called "she"
EVENTS = {"bought", "put", "gave"}  # what happens at some time, while the others hold all the time


@dataclass
class Fact:
    attribute: str
    slots: dict[str, str]


@dataclass
class Question:
    text: str
    answer: str
    kind: str  # qa, unanswerable, coreference or passkey
    sentence: str = ""  # the answer as a whole sentence, for a chat
    choices: list[str] = field(default_factory=list)
    attribute: str = ""


def estimate(text: str) -> int:
    """About how many tokens a text has: the tokenizer knows every word of this world."""
    return len(re.findall(r"[A-Za-z]+|[^\sA-Za-z]|\n+", text))


def listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


class Story:
    """People, what is told of them, and what can be asked."""

    def __init__(
        self,
        rng: random.Random,
        tokens: int,
        jobs: bool = False,
        dense: bool = False,
        attributes: list[str] = list(ATTRIBUTES),
    ) -> None:
        self.rng = rng
        self.tokens = round(tokens / 1.09)  # a rare word is more than one token
        self.taken: set[str] = set()
        # More people and facts in longer stories, but fewer for their length.
        count = 2 + (tokens > 110) + (tokens > 190) + (tokens > 380) + (tokens > 700)
        if dense:
            count = max(2, min(6, round(tokens / 45)))
        self.people = rng.sample(WOMEN, (count + 1) // 2) + rng.sample(MEN, count // 2)
        rng.shuffle(self.people)
        self.person = self.people[0]
        room = max(1, round((tokens - 10) / 13 * rng.uniform(0.6, 1.0)))
        each = min(max(1, round(room / count)), rng.randint(4, 7))
        if dense:
            each = max(1, min(9, len(attributes), round(tokens / 13 / count)))
        self.facts: dict[str, list[Fact]] = {}
        for person in self.people:
            self.person = person
            names = rng.sample(attributes, each)
            if jobs and "job" not in names:
                names[0] = "job"
            self.facts[person] = [self.fact(person, name) for name in names]

    def take(self, words: list[str]) -> str:
        """A word that this story has not used yet, so that no two facts can be mixed up."""
        left = [w for w in words if w not in self.taken]
        word = self.rng.choice(left or words)
        self.taken.add(word)
        return word

    def other(self) -> str:
        return self.rng.choice([p for p in self.people if p != self.person])

    def fact(self, person: str, attribute: str) -> Fact:
        slots = ATTRIBUTES[attribute].draw(self)
        woman = person in WOMEN
        slots |= {"n": person, "S": "She" if woman else "He", "S_": "she" if woman else "he"}
        slots |= {"p": "her" if woman else "his", "P": "Her" if woman else "His"}
        slots["q"] = "her" if woman else "him"
        return Fact(attribute, slots)

    # -------------------------------------------------------------------------- telling

    def unit(self, facts: list[Fact], style: str) -> str:
        """One or more facts of a person in a row; the person is named once."""
        rng, sentences = self.rng, []
        for i, fact in enumerate(facts):
            attribute = ATTRIBUTES[fact.attribute]
            if style == "dialogue" and rng.random() < 0.6:
                speech = rng.choice(attribute.speech).format(**fact.slots)
                who = fact.slots["n"] if i == 0 else fact.slots["S_"]
                sentences.append(f'"{speech}," said {who}.')
            elif i and rng.random() < 0.8:
                sentences.append(rng.choice(attribute.pronoun).format(**fact.slots))
            else:
                sentence = rng.choice(attribute.tell).format(**fact.slots)
                if style == "day" and fact.attribute in EVENTS:
                    sentence = f"{rng.choice(DAY)} {sentence}"
                sentences.append(sentence)
        return " ".join(sentences)

    def units(self) -> list[str]:
        """All facts, in a style and an order of its own."""
        rng = self.rng
        style = rng.choice(["plain", "plain", "dialogue", "day"])
        units, again = [], []
        for person in self.people:
            facts = list(self.facts[person])
            rng.shuffle(facts)
            while facts:
                size = rng.choice([1, 1, 2, 3])
                units.append(self.unit(facts[:size], style))
                if rng.random() < 0.12:
                    again.append(self.unit([rng.choice(facts[:size])], "plain"))
                facts = facts[size:]
        if rng.random() < 0.6:  # else person after person
            rng.shuffle(units)
        for unit in again:
            units.insert(rng.randint(len(units) // 2, len(units)), unit)
        return units

    def filler(self) -> str:
        rng = self.rng
        n, m = rng.sample(self.people, 2)
        return rng.choice(FILLER).format(n=n, m=m, spot=rng.choice(SPOTS), number=rng.choice(NUMBERS[:11]))

    def text(self, units: list[str], places: list[float] | None = None, end: str = "") -> str:
        """Units among filler, in paragraphs, as long as was asked. places: for the first units, how
        far down in the text they come, from 0 to 1; the others keep their order."""
        rng = self.rng
        places = places or []
        fixed, units = units[: len(places)], units[len(places) :]
        if rng.random() < 0.5:
            names = listed(self.people)
            count = NUMBERS[len(self.people) - 2]
            units.insert(0, rng.choice(OPENINGS).format(names=names, count=count))
        left = self.tokens - sum(map(estimate, units + fixed)) - estimate(end)
        filler: list[str] = []
        while (size := estimate(sentence := self.filler())) <= left:
            filler.append(sentence)
            left -= size
        # Where among the filler each unit stands: anywhere, or early, so that answers lie far back.
        stretch = rng.choice([1.0, 1.0, 0.6])
        cuts = sorted(int(rng.random() * stretch * (len(filler) + 1)) for _ in units)
        sentences, done = [], 0
        for cut, unit in zip(cuts, units):
            sentences += filler[done:cut] + [unit]
            done = cut
        sentences += filler[done:]
        total = sum(map(estimate, sentences))
        for place, unit in zip(places, fixed):
            at, before = 0, 0
            while at < len(sentences) and before + estimate(sentences[at]) / 2 < place * total:
                before += estimate(sentences[at])
                at += 1
            sentences.insert(at, unit)
        if end:
            sentences.append(end)
        breaks = rng.random() < 0.6
        text = sentences[0]
        for sentence in sentences[1:]:
            text += ("\n\n" if breaks and rng.random() < 0.15 else " ") + sentence
        return text

    # -------------------------------------------------------------------------- asking

    def questions(self) -> Iterator[Question]:
        """Every answerable question, in random order."""
        facts = [fact for facts in self.facts.values() for fact in facts]
        pairs = [(f, i) for f in facts for i in range(len(ATTRIBUTES[f.attribute].ask))]
        self.rng.shuffle(pairs)
        for fact, i in pairs:
            attribute = ATTRIBUTES[fact.attribute]
            text, slot = attribute.ask[i]
            yield Question(
                text.format(**fact.slots),
                fact.slots[slot],
                "qa",
                attribute.tell[0].format(**fact.slots),
                attribute=fact.attribute,
            )

    def unanswerable(self) -> Iterator[Question]:
        """Questions whose answers were not told: other facts of the people in the story."""
        rng = self.rng
        while True:
            person = self.person = rng.choice(self.people)
            told = {fact.attribute for fact in self.facts[person]}
            name = rng.choice([name for name in ATTRIBUTES if name not in told])
            fact = self.fact(person, name)
            text = rng.choice(ATTRIBUTES[name].ask)[0].format(**fact.slots)
            yield Question(text, UNKNOWN, "unanswerable", "I do not know.", attribute=name)

    def deeds(self, count: int, easy: float = 0.0) -> tuple[list[str], list[Question]]:
        """Sentences where "she", "he" or "the baker" did something, and who it was. easy: share of
        them that are steps towards that: who did it is named, with nobody else around or with
        somebody, or there is nobody else, or the text itself says who it was."""
        rng, sentences, questions = self.rng, [], []
        women = [p for p in self.people if p in WOMEN]
        men = [p for p in self.people if p in MEN]
        for _ in range(count):
            deed, spot = self.take(DEEDS), rng.choice(SPOTS)
            pair = [rng.choice(women), rng.choice(men)]
            rng.shuffle(pair)
            doer = rng.choice(pair)
            jobs = {f.slots["n"]: f.slots["v"] for p in pair for f in self.facts[p] if f.attribute == "job"}
            word = "she" if doer in WOMEN else "he"
            if len(jobs) == 2 and rng.random() < 0.4:
                word = f"the {jobs[doer]}"
            first, second = pair
            step = rng.choice(["plain", "named", "alone", "said"]) if rng.random() < easy else ""
            if step == "plain":
                sentences.append(f"{rng.choice(DAY)} {doer} {deed}." if rng.random() < 0.3 else f"{doer} {deed}.")
                questions.append(Question(f"Who {deed}?", doer, "coreference", f"{doer} {deed}.", sorted(pair)))
                continue
            if step == "alone":
                word = "she" if doer in WOMEN else "he"
                sentences.append(
                    rng.choice(
                        [
                            f"{doer} came to the {spot}. There {word} {deed}.",
                            f"{doer} stopped at the {spot}, and {word} {deed}.",
                            f"{doer} sat down for a moment. After a while {word} {deed}.",
                        ]
                    )
                )
                questions.append(Question(f"Who {deed}?", doer, "coreference", f"{doer} {deed}.", sorted(pair)))
                continue
            if step == "named":
                word = doer
            sentences.append(
                rng.choice(
                    [
                        f"{first} met {second} at the {spot}, and {word} {deed}.",
                        f"While {first} was talking with {second}, {word} {deed}.",
                        f"{first} and {second} came to the {spot}. There {word} {deed}.",
                        f"{first} sat next to {second}. After a while {word} {deed}.",
                    ]
                )
            )
            if step == "said":
                sentences[-1] += f" {rng.choice(HINTS)} {doer}."
            choices = sorted(pair)
            kind = "coreference"
            questions.append(Question(f"Who {deed}?", doer, kind, f"{doer} {deed}.", choices))
        return sentences, questions


def passkey(rng: random.Random) -> tuple[str, Question]:
    key = str(rng.randint(10000, 99999))
    told = rng.choice(
        [
            f"The pass key is {key}. Remember it: {key} is the pass key.",
            f"Remember this: the pass key is {key}.",
            f"The pass key is {key}. Do not forget that {key} is the pass key.",
        ]
    )
    return told, Question("What is the pass key?", key, "passkey", f"The pass key is {key}.")


# ------------------------------------------------------------------------------ documents


@dataclass
class Document:
    """Pieces of text, and whether each is an answer (which weighs more in training)."""

    kind: str
    pieces: list[tuple[str, bool]]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


def prompt(text: str, question: str) -> str:
    """A text and a question as documents have them; the answer comes after a space."""
    return f"{text}\n\nQuestion: {question}\nAnswer:"


def first(questions: Iterator[Question], count: int) -> list[Question]:
    return [q for q, _ in zip(questions, range(count))]


def ask(story: Story, count: int) -> list[Question]:
    """Answerable and unanswerable questions, none twice."""
    rng = story.rng
    unanswerable = sum(rng.random() < UNANSWERABLE for _ in range(count))
    questions = first(story.questions(), count - unanswerable)
    questions += first(story.unanswerable(), unanswerable)
    questions = list({q.text: q for q in questions}.values())
    rng.shuffle(questions)
    return questions


def with_questions(rng: random.Random, kind: str, tokens: int) -> Document:
    """A text, then questions about it."""
    count = max(2, min(12, round(tokens * rng.uniform(0.25, 0.4) / 15)))
    told, questions, places = [], [], None
    if kind == "passkey":
        count = min(count, 4)
    each = 22 if kind == "coreference" else 16
    story = Story(rng, max(30, tokens - each * count - 3), jobs=kind == "coreference")
    if kind == "qa":
        questions = ask(story, count)
    elif kind == "coreference":
        told, questions = story.deeds(min(count, 2 + len(story.people) // 2), easy=0.2)
        questions += ask(story, count - len(questions))
    else:
        sentence, question = passkey(rng)
        told, questions, places = [sentence], [question], [rng.random()]
        questions += ask(story, count - 1)
    rng.shuffle(questions)
    units = story.units()
    if kind == "coreference":  # after the jobs were told, for the most part
        for sentence in told:
            units.insert(rng.randint(len(units) // 2, len(units)), sentence)
    else:
        units = told + units
    pieces = [(BEGIN + story.text(units, places) + "\n\n", False)]
    for i, question in enumerate(questions):
        pieces += [(f"Question: {question.text}\nAnswer:", False)]
        pieces += [(f" {question.answer}\n", True)]
    return Document(kind, pieces + [(END, False)])


def plain_story(rng: random.Random, tokens: int) -> Document:
    """A story that comes back, towards its end, to what it told."""
    story = Story(rng, tokens - 3)
    facts = [fact for facts in story.facts.values() for fact in facts]
    chosen = rng.sample(facts, min(len(facts), max(1, tokens // 80)))
    recaps = [rng.choice(ATTRIBUTES[f.attribute].recap).format(**f.slots) for f in chosen]
    end = rng.choice(["That was all.", "So the day ended.", "Then it was night.", "And so it went on."])
    end = " ".join(recaps + [end])
    return Document("story", [(BEGIN + story.text(story.units(), end=end) + "\n", False), (END, False)])


SMALL_TALK = [
    ("Hello!", "Hello! Tell me about some people, and then ask me about them."),
    ("Hello.", "Hello! What would you like to tell me?"),
    ("Hi!", "Hello! What would you like to tell me?"),
    ("Good morning.", "Good morning! Tell me about some people."),
    ("How are you?", "I am fine, thank you."),
    ("Who are you?", "I am a small language model. I know only what you tell me."),
    ("What can you do?", "Tell me about some people, and I will answer questions about them."),
]
RECEIVED = ["I see.", "Thank you, I will remember that.", "Good to know.", "I will remember."]
PARTING = [
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye.", "Goodbye!"),
    ("That is all.", "Then goodbye!"),
]


def turn(role: str, text: str, answer: bool = False) -> list[tuple[str, bool]]:
    return [(f"{role}:", False), (f" {text}", answer), (END_OF_TURN, answer)]


def chat(rng: random.Random, tokens: int) -> Document:
    """A user tells about people and asks; the assistant answers in sentences."""
    pieces: list[tuple[str, bool]] = [(BEGIN, False)]
    size = 8

    def say(question: str, reply: str, answer: bool = False) -> None:
        nonlocal pieces, size
        pieces += turn("User", question) + turn("Assistant", reply, answer)
        size += estimate(question) + estimate(reply) + 6

    if rng.random() < 0.3:
        say(*rng.choice(SMALL_TALK))
    count = max(2, min(10, round(tokens * rng.uniform(0.3, 0.45) / 22)))
    story = Story(rng, max(24, tokens - 24 * count - 20 - size), jobs=rng.random() < 0.5)
    questions = ask(story, count)
    told: list[str] = []
    if tokens > 150 and rng.random() < 0.3:
        told, more = story.deeds(1)
        questions = more + questions[1:]
        rng.shuffle(questions)
    if rng.random() < 0.2:  # the assistant tells the story
        names = listed(story.people)
        request = rng.choice(["Tell me a story about {}.", "Please tell me about {}."]).format(names)
        say(request, story.text(story.units() + told))
    elif rng.random() < 0.5:  # at once
        say(story.text(story.units() + told), rng.choice(RECEIVED))
    else:  # bit by bit, with filler where there is room
        units = story.units() + told
        room = story.tokens - sum(estimate(u) + 12 for u in units)
        while units:
            part = [units.pop(0) for _ in range(min(len(units), rng.choice([1, 1, 2, 3])))]
            while room > 12 * len(part) and rng.random() < 0.6:
                part.insert(rng.randint(0, len(part)), sentence := story.filler())
                room -= estimate(sentence)
            say(" ".join(part), rng.choice(RECEIVED))
    for question in questions:
        if size + estimate(question.text) + estimate(question.sentence) + 8 > tokens:
            break
        say(question.text, question.sentence, answer=True)
    if size + 14 < tokens and rng.random() < 0.5:
        say(*rng.choice(PARTING))
    return Document("chat", pieces + [(END, False)])


def hinted(text: str) -> Iterator[tuple[str, bool]]:
    """Pieces of a text: a name after a hint is an answer, since the text has said whose it is."""
    at = 0
    for hint in re.finditer(rf"(?:{'|'.join(HINTS)})( \w+)\.", text):
        yield text[at : hint.start(1)], False
        yield hint[1], True
        at = hint.end(1)
    yield text[at:], False


def dense(rng: random.Random, tokens: int, topic: str = "") -> Document:
    """Nothing but facts, deeds or numbers, and questions about all of them."""
    topic = topic or rng.choices(["facts", "deeds", "numbers"], [0.4, 0.5, 0.1])[0]
    jobs = topic == "deeds" and tokens > 100 and rng.random() < 0.5
    attributes = ["age", "phone"] if topic == "numbers" else list(ATTRIBUTES)
    story = Story(rng, (tokens - 12) // 2, jobs=jobs, dense=True, attributes=attributes)
    if topic == "deeds":
        for person, facts in story.facts.items():
            story.facts[person] = [fact for fact in facts if jobs and fact.attribute == "job"]
    units, questions = story.units(), list(story.questions())
    if topic == "deeds":
        told, more = story.deeds(min(len(DEEDS), max(2, (tokens - 30 * jobs) // 34)), easy=0.6)
        units, questions = units + told, questions[:1] + more
    elif topic == "numbers" and rng.random() < 0.7:
        told, question = passkey(rng)
        units.insert(rng.randint(0, len(units)), told)
        questions.append(question)
    rng.shuffle(questions)
    text = " ".join(units)
    pieces = list(hinted(BEGIN + text + "\n\n"))
    size, unanswerable, asked = estimate(text) + 4, story.unanswerable(), 0
    while questions:
        question = next(unanswerable) if rng.random() < UNANSWERABLE_DENSE else questions.pop()
        size += estimate(question.text) + estimate(question.answer) + 6
        if size > tokens and asked:
            break
        pieces += [(f"Question: {question.text}\nAnswer:", False), (f" {question.answer}\n", True)]
        asked += 1
    return Document(DENSE, pieces + [(END, False)])


def document(
    rng: random.Random, tokens: int, kind: str | None = None, share: float = 0.1, deeds: float = 0.0
) -> Document:
    """A document of about this many tokens (seldom a few more). share: of dense ones; deeds: of those
    among all that are about who "she" was, before anything else is drawn."""
    if not kind and rng.random() < deeds:
        return dense(rng, tokens, "deeds") if rng.random() < share else with_questions(rng, "coreference", tokens)
    if not kind:
        kind = DENSE if rng.random() < share else rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == DENSE:
        return dense(rng, tokens)
    if kind == "story":
        return plain_story(rng, tokens)
    if kind == "chat":
        return chat(rng, tokens)
    return with_questions(rng, kind, tokens)


# ------------------------------------------------------------------------------ evaluation


def texts(seed: int, count: int, tokens: int) -> Iterator[dict]:
    """Plain stories, for perplexity."""
    for i in range(count):
        rng = random.Random(HELD_OUT + seed * 1_000_003 + i)
        text = plain_story(rng, tokens).pieces[0][0].removeprefix(BEGIN)
        yield {"id": f"text-{tokens}-{i}", "text": text}


def single(rng: random.Random, kind: str, tokens: int) -> tuple[str, Question]:
    """A text and one question of this kind."""
    story = Story(rng, tokens - 20, jobs=kind == "coreference")
    if kind == "coreference":
        told, questions = story.deeds(2)
        units = story.units()
        for sentence in told:
            units.insert(rng.randint(len(units) // 2, len(units)), sentence)
        return story.text(units), questions[0]
    question = next(story.questions() if kind == "qa" else story.unanswerable())
    return story.text(story.units()), question


def choice_row(id_: str, text: str, question: Question, choices: list[str]) -> dict:
    return {
        "id": id_,
        "context": prompt(text, question.text),
        "choices": [f" {choice}" for choice in choices],
        "label": choices.index(question.answer),
    }


def coreference(seed: int, count: int, tokens: int) -> Iterator[dict]:
    """Who was meant by "she", "he" or "the baker"? Two choices."""
    for i in range(count):
        rng = random.Random(HELD_OUT + seed * 1_000_003 + i)
        text, question = single(rng, "coreference", tokens)
        yield choice_row(f"coreference-{tokens}-{i}", text, question, question.choices)


def multiple_choice(seed: int, count: int, tokens: int) -> Iterator[dict]:
    """An answerable question with four choices, of which as many as possible are in the text."""
    for i in range(count):
        rng = random.Random(HELD_OUT + seed * 1_000_003 + i)
        text, question = single(rng, "qa", tokens)
        kinds = [WOMEN + MEN, PLACES, JOBS, ANIMALS, PET_NAMES, COLOURS, FOODS, THINGS, NUMBERS, CONTAINERS]
        alike = next((kind for kind in kinds if question.answer in kind), None)
        if alike is None and question.answer.isdigit():
            low, high = (18, 89) if len(question.answer) == 2 else (10000, 99999)
            alike = re.findall(rf"\b\d{{{len(question.answer)}}}\b", text)
            alike += [str(rng.randint(low, high)) for _ in range(6)]
        elif alike is None:  # a coloured object
            alike = [f"{rng.choice(COLOURS)} {object_}" for object_ in OBJECTS]
            alike += re.findall(rf"\b(?:{'|'.join(COLOURS)}) (?:{'|'.join(OBJECTS)})\b", text)
        others = sorted({word for word in alike if word != question.answer})
        rng.shuffle(others)
        others.sort(key=lambda word: re.search(rf"\b{word}\b", text) is None)
        choices = sorted([question.answer, *others[:3]])
        yield choice_row(f"choice-{tokens}-{i}", text, question, choices)


def extractive(seed: int, count: int, tokens: int) -> Iterator[dict]:
    """Questions answered by words of the text, every third by none: the fields of SQuAD 2.0."""
    for i in range(count):
        rng = random.Random(HELD_OUT + seed * 1_000_003 + i)
        kind = "unanswerable" if i % 3 == 2 else "qa"
        text, question = single(rng, kind, tokens)
        answers: dict[str, list] = {"text": [], "answer_start": []}
        if kind == "qa":
            found = re.finditer(rf"\b{re.escape(question.answer)}\b", text)
            starts = [match.start() for match in found]
            answers = {"text": [question.answer] * len(starts), "answer_start": starts}
            assert starts, (text, question)
        yield {
            "id": f"qa-{tokens}-{i}",
            "context": text,
            "question": question.text,
            "prompt": prompt(text, question.text),
            "no_answer": UNKNOWN,
            "answers": answers,
            "is_impossible": kind == "unanswerable",
        }


def passkeys(seed: int, count: int, tokens: int, depths: int = 5) -> Iterator[dict]:
    """A pass key at even steps of depth, 0 at the beginning and 1 at the end."""
    for i in range(count):
        rng = random.Random(HELD_OUT + seed * 1_000_003 + i)
        depth = i % depths / (depths - 1)
        story = Story(rng, tokens - 40)
        sentence, question = passkey(rng)
        text = story.text([sentence] + story.units(), [depth])
        yield {
            "id": f"passkey-{tokens}-{i}",
            "context": prompt(text, question.text),
            "answer": question.answer,
            "depth": depth,
            "length": tokens,
        }


SETS = {
    "text": texts,
    "choice": multiple_choice,
    "coreference": coreference,
    "qa": extractive,
    "passkey": passkeys,
}


def write_jsonl(path: Path, rows: Iterator[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print documents")
    show.add_argument("--kind", choices=[*KINDS, DENSE])
    show.add_argument("--tokens", type=int, default=256)
    show.add_argument("--seed", type=int, default=0)
    show.add_argument("-n", type=int, default=1, help="how many")
    evaluate = commands.add_parser("evaluate", help="write held-out evaluation sets as JSONL")
    evaluate.add_argument("folder", type=Path)
    evaluate.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1000])
    evaluate.add_argument("-n", type=int, default=300, help="rows in a file")
    evaluate.add_argument("--seed", type=int, default=0)
    text = commands.add_parser("text", help="print held-out stories, one after the other")
    text.add_argument("-n", type=int, default=20, help="how many")
    text.add_argument("--tokens", type=int, default=1000)
    text.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args()
    if args.command == "text":
        for row in texts(args.seed, args.n, args.tokens):
            print(row["text"], end="\n\n")
        return
    if args.command == "show":
        for i in range(args.n):
            print(document(random.Random(args.seed + i), args.tokens, args.kind).text, end="\n\n")
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in SETS.items():
        for tokens in args.lengths:
            write_jsonl(args.folder / f"{name}-{tokens}.jsonl", rows(args.seed, args.n, tokens))


if __name__ == "__main__":
    main()
