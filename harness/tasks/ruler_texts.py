"""Texts of a chosen length with something to find in them, after RULER (Hsieh et al. 2024, arXiv 2404.06654).

A text is made of a chosen number of units (sentences, words) around what is to be found. The draws of names, values
and places come from `draw` alone. Words are ours: RULER takes them from other packages.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
ADJECTIVES = """
amber ancient bitter blue brave brief bright broad calm clean clever cold cool curly damp dark deep dry early eager
empty faint fair famous fast fine firm flat fresh gentle glad golden grand gray great green happy hard heavy hollow
honest huge humble icy jolly keen kind large late lazy light little lonely long loud low lucky merry mild modern
narrow neat new noble odd old open pale plain polite proud pure quick quiet rapid rare red rich ripe rough round royal
rusty safe salty shallow sharp short shy silent silver simple slim slow small smooth soft solid sour steady steep
still stout strange strong sunny sweet swift tall tender thick thin tidy tiny tough vast warm weak wet wide wild wise
wooden young
""".split()
NOUNS = """
acorn anchor apple arrow badge bag ball banana barn basket beach bean bear bed bee bell bench bird boat book boot
bottle bowl box branch bread brick bridge broom brush bucket button cabin cake camel camera candle canoe cap car card
carpet carrot castle cat cave chain chair cheese cherry circle clock cloud coat coin comb corn cow crown cup curtain
desk dish dog doll door dragon drum duck eagle ear egg elbow engine envelope farm feather fence field finger fire fish
flag flower flute forest fork fountain fox frog fruit garden gate ghost giraffe glass glove goat goose grape guitar
hammer hand harbor hat hawk hill honey horn horse house island jacket jar jewel kettle key kite kitten knife ladder
lake lamp leaf lemon letter lion lizard lock map market mask meadow melon mirror moon mountain mouse mug nail needle
nest net nut oak oar ocean onion orange oven owl paddle page paint palace pan paper parrot peach pear pebble pen
pencil piano picture pie pigeon pillow pine pipe plate plum pocket pond potato pumpkin puppet rabbit radio rain ribbon
ring river road robin rock roof room root rope rose ruler sail salt sand saddle school scissors seed shadow sheep
shelf shell ship shirt shoe shovel sock spider spoon spring squirrel stair star stone stool storm stove straw street
suit sword table tail tea tent thumb tiger tool tooth torch tower toy train tray tree truck trumpet tulip turtle
umbrella valley vase village violin wagon wall watch water wave well whale wheel whistle willow window wing wolf yard
""".split()
ZETA_2 = math.pi**2 / 6  # the sum of 1 / k^2, which makes the frequencies of coded words sum to their number


@dataclass(frozen=True)
class Question:
    """A text with its question, the words with which its answer begins, and what the answer must contain."""

    text: str
    opening: str
    answers: tuple[str, ...]

    def solved(self) -> str:
        """Return the text with its whole answer, as an example for the model."""
        return f"{self.text}{self.opening} {' '.join(self.answers)}\n\n"


@dataclass(frozen=True)
class Form:
    """A kind of question. make: a function from draws, a number of units and the filler sentences to a Question.

    least: the smallest number of units. new_tokens: the tokens that an answer may have, which are those of RULER.
    """

    make: Callable[[random.Random, int, Sequence[str]], Question]
    least: int
    new_tokens: int


def _pairs(draw: random.Random, count: int) -> list[str]:
    """Return distinct words such as quiet-river."""
    numbers = draw.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[number % len(ADJECTIVES)]}-{NOUNS[number // len(ADJECTIVES)]}" for number in numbers]


def _hidden(draw: random.Random, sentences: Sequence[str], size: int, filler: Sequence[str], sort: bool) -> str:
    """Return filler sentences with others at random depths. sort: whether these keep their order."""
    depths = [draw.random() for _ in sentences]
    places = [int(depth * size) for depth in (sorted(depths) if sort else depths)]
    start = draw.randrange(len(filler))
    parts = []
    for unit in range(size):
        parts += [sentence for sentence, place in zip(sentences, places) if place == unit]
        parts.append(filler[(start + unit) % len(filler)])
    return " ".join(parts)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"


def needles(n_keys: int, n_values: int, n_queries: int) -> Form:
    """Return the form "needle in a haystack": `n_values` numbers for each of `n_keys` keys; some keys are asked for."""

    def make(draw: random.Random, size: int, filler: Sequence[str]) -> Question:
        keys = _pairs(draw, n_keys)
        numbers = [str(number) for number in draw.sample(range(1_000_000, 10_000_000), n_keys * n_values)]
        of_key = {key: numbers[i * n_values : (i + 1) * n_values] for i, key in enumerate(keys)}
        said = [f"One of the special magic numbers for {key} is: {number}." for key in keys for number in of_key[key]]
        asked = keys[:n_queries]
        answers = tuple(number for key in asked for number in of_key[key])
        context, names = _hidden(draw, said, size, filler, sort=False), _listed(asked)
        several = len(answers) > 1
        question = (
            f"What {'are all the special magic numbers' if several else 'is the special magic number'} for {names}"
            " mentioned in the provided text?"
        )
        text = (
            "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz"
            f" you about the numbers afterwards.\n{context}\n{question}"
        )
        opening = (
            f" The special magic number{'s' if several else ''} for {names} mentioned in the provided text"
            f" {'are' if several else 'is'}"
        )
        return Question(text, opening, answers)

    return Form(make, n_keys * n_values, 128)


def _chain(draw: random.Random, size: int, filler: Sequence[str]) -> Question:
    """Return variables that are set to each other in a chain; all that hold the first value are asked for."""
    names: list[str] = []
    while len(names) < 5:
        name = "".join(draw.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))
        names += [name] if name not in names else []
    value = str(draw.randrange(10_000, 100_000))
    said = [f"VAR {name} = {source}" for name, source in zip(names, [value, *(f"VAR {name}" for name in names)])]
    context = _hidden(draw, said, size, filler, sort=True)
    text = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
    )
    opening = (
        " Answer: According to the chain(s) of variable assignment in the text above,"
        f" {len(names)} variables are assigned the value {value}, they are:"
    )
    return Question(text, opening, tuple(names))


def _tracking(draw: random.Random, size: int, filler: Sequence[str]) -> Question:
    example = _chain(draw, 10, FILLER)
    asked = _chain(draw, size, filler)
    return Question(example.solved() + asked.text, asked.opening, asked.answers)


def _counted(draw: random.Random, rare: int, often: int, seldom: int) -> Question:
    """Return a numbered list with ten words `often` times and `rare` words `seldom` times each."""
    words = _pairs(draw, 10 + rare)
    common = words[:10]
    listed = common * often + words[10:] * seldom
    draw.shuffle(listed)
    context = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
    text = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that"
        f" appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
    )
    opening = " Answer: The top 10 words that appear most often in the list are:"
    return Question(text, opening, tuple(common))


def _common_words(draw: random.Random, size: int, filler: Sequence[str]) -> Question:
    example = _counted(draw, 10, 3, 1)
    asked = _counted(draw, size, 30, 3)
    return Question(example.solved() + asked.text, asked.opening, asked.answers)


def _frequent_words(draw: random.Random, size: int, filler: Sequence[str]) -> Question:
    """Return coded words, of which number k appears in about size / (ZETA_2 k^2) places; number 1 is dots."""
    counts: list[int] = []
    while (count := int(size / ZETA_2 / (len(counts) + 1) ** 2)) > 0:
        counts.append(count)
    words = ["....."]
    while len(words) < len(counts):
        word = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6))
        words += [word] if word not in words else []
    listed = [word for word, count in zip(words, counts) for _ in range(count)]
    draw.shuffle(listed)
    text = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently"
        f" appeared coded words. {' '.join(listed)}\nQuestion: Do not provide any explanation. Please ignore the dots"
        " '.....'. What are the three most frequently appeared words in the above coded text?"
    )
    opening = " Answer: According to the coded text above, the three most frequently appeared words are:"
    return Question(text, opening, tuple(words[1:4]))


FORMS = {
    "niah_single": needles(1, 1, 1),
    "niah_multikey": needles(4, 1, 1),
    "niah_multivalue": needles(1, 4, 1),
    "niah_multiquery": needles(4, 1, 4),
    "vt": Form(_tracking, 5, 30),
    "cwe": Form(_common_words, 1, 120),
    # with 60 words the fourth and the fifth most frequent one have different counts
    "fwe": Form(_frequent_words, 60, 50),
}
