"""Conversations made up from a seed: small computations, written out step by step, and questions about the model.

    for key, messages in generated(seed, facts): ...      # endless
    key, question, answer = ask("addition", rng, facts)

Answers go through their parts (digits from the right with their carry; letters one by one with the count so far),
because a small model learns steps where it cannot learn a table of results. They end with "The answer is ...".
"""

import calendar
import datetime
import random
from collections.abc import Callable, Iterator

SYLLABLES = [c + v for c in "bcdfghklmnprstvwz" for v in "aeiou"]
WORDS = tuple(
    """apple banana orange cherry lemon table chair window letter number strawberry pepper butter coffee cheese bread
    water river mountain forest garden flower summer winter spring yellow purple green silver golden little bottle
    python class function return import string object value error model kernel token weight layer attention distance
    computer keyboard program language sentence question answer history science music picture mirror kitchen ladder
    hammer tunnel pillow rabbit kitten puppy horse sheep zebra elephant tiger parrot penguin turtle balloon bubble
    """.split()  # noqa: SIM905 (a list would take a line a word)
)
SCORED_TASKS = ("addition", "counting")
"""Tasks that scripts.chat_eval asks. Their answers are right or wrong."""
MAX_QUESTIONS = 200  # of a task that it asks by default
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")

Turn = tuple[str, str, str]
"""(key, question, answer). The key says what is asked, whatever the words; it decides between train and val."""


def _addition(rng: random.Random, facts: dict[str, str]) -> Turn:
    [longest] = rng.choices((1, 2, 3), (1, 4, 5))
    other = longest if rng.random() < 0.6 else rng.randint(1, longest)
    a, b = (_number(rng, digits) for digits in rng.sample((longest, other), 2))
    question = rng.choice(("What is {} + {}?", "{} + {} = ?", "Add {} and {}.", "How much is {} plus {}?"))
    steps, carry = [], 0
    for place in range(longest):
        parts = [a // 10**place % 10, b // 10**place % 10, *([carry] if place else [])]
        steps.append(f"{'+'.join(map(str, parts))}={sum(parts)}")
        carry = sum(parts) // 10
    digits = " ".join(str(a + b))  # one by one first: a token of the answer may hold two of them
    return f"addition {a} {b}", question.format(a, b), f"{', '.join(steps)}. {digits}. The answer is {a + b}."


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _word(rng: random.Random) -> str:
    return rng.choice(WORDS) if rng.random() < 0.5 else "".join(rng.choices(SYLLABLES, k=rng.randint(2, 4)))


def _insert(rng: random.Random, word: str, letter: str) -> str:
    """Return a word with a letter once or twice more, anywhere."""
    at = rng.randint(0, len(word))
    return word[:at] + letter * rng.randint(1, 2) + word[at:]


def _counting(rng: random.Random, facts: dict[str, str]) -> Turn:
    word = _word(rng)
    present = rng.random() < 0.8
    letter = rng.choice(word if present else "abcdefghijklmnoprstuvwyz")
    if rng.random() < 0.5:  # counts above 1 are rare otherwise
        word = _insert(rng, word, letter)
    n, steps = 0, []
    for character in word:
        n += character == letter
        steps.append(f"{character} {letter}{n}")
    question = rng.choice(("How many {1} are in {0}?", "How often does {1} occur in {0}?", "Count the {1} in {0}."))
    return f"counting {word} {letter}", question.format(word, letter), f"{', '.join(steps)}. The answer is {n}."


def _spelling(rng: random.Random, facts: dict[str, str]) -> Turn:
    word = _word(rng)
    if rng.random() < 0.5:
        word = _insert(rng, word, rng.choice(word))
    question = rng.choice(("Spell {}.", "How do you spell {}?", "What are the letters of {}?"))
    return f"spelling {word}", question.format(word), f"{', '.join(word)}."


def _sorting(rng: random.Random, facts: dict[str, str]) -> Turn:
    numbers = rng.sample(range(10, 100), rng.randint(2, 4))
    question = rng.choice(("Sort {}.", "Put {} in order.", "Sort these numbers: {}."))
    listed = ", ".join(map(str, numbers))
    return f"sorting {listed}", question.format(listed), f"The answer is {', '.join(map(str, sorted(numbers)))}."


def _dates(rng: random.Random, facts: dict[str, str]) -> Turn:
    # Days of the week are always in train: a day that is left out follows from no rule.
    kind, train_key = rng.randrange(3), f"train {rng.random()}"
    if kind == 0:
        day, direction = rng.randrange(7), rng.choice(("after", "before"))
        answer = DAYS[(day + (1 if direction == "after" else -1)) % 7]
        return train_key, f"What day comes {direction} {DAYS[day]}?", f"The answer is {answer}."
    if kind == 1:
        month, year = rng.randint(1, 12), rng.randint(2001, 2040)
        days = calendar.monthrange(year, month)[1]
        name = calendar.month_name[month]
        return f"dates {month} {year}", f"How many days has {name} {year}?", f"The answer is {days}."
    day = datetime.date(2001, 1, 1) + datetime.timedelta(days=rng.randrange(40 * 365))
    following = day + datetime.timedelta(days=1)
    return f"dates {day}", f"What date follows {day}?", f"The answer is {following}."


def _self(rng: random.Random, facts: dict[str, str]) -> Turn:
    question, answer = rng.choice(
        (
            ("Who are you?", "I am gkachat, a small language model."),
            ("What is your name?", "My name is gkachat."),
            ("Hello!", "Hello! I am gkachat. I can add two numbers, count letters, spell, sort and tell dates."),
            ("What can you do?", "I can add two numbers, count letters, spell, sort and tell dates."),
            ("What kind of attention do you use?", "I use {attention} attention."),
            ("How many parameters do you have?", "I have {parameters} parameters."),
            ("How many layers do you have?", "I have {depth} layers."),
        )
    )
    return f"train {rng.random()}", question, answer.format(**facts)


TASKS: dict[str, tuple[Callable[[random.Random, dict[str, str]], Turn], float]] = {
    "addition": (_addition, 0.38),
    "counting": (_counting, 0.37),
    "spelling": (_spelling, 0.11),
    "sorting": (_sorting, 0.05),
    "dates": (_dates, 0.05),
    "self": (_self, 0.04),
}
"""Each task's function and its share of the conversations."""


def kind_of(key: str) -> str:
    """Return what scores of a task are told apart by: the digits of an addition's longer number, otherwise nothing."""
    task, *numbers = key.split(" ")
    digits = max(map(len, numbers))
    return f"{digits} digit{'s' if digits > 1 else ''}" if task == "addition" else ""


def ask(task: str, rng: random.Random, facts: dict[str, str]) -> Turn:
    """Draw a question of a task. `facts` are needed by "self" only; see `generated`."""
    return TASKS[task][0](rng, facts)


def generated(seed: int, facts: dict[str, str]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yield (key, messages) without end; some conversations have two turns.

    `facts` say what the model knows about itself: attention, parameters, depth.
    """
    rng, shares = random.Random(seed), [share for _, share in TASKS.values()]
    while True:
        [task] = rng.choices(list(TASKS), shares)
        key, *turns = ask(task, rng, facts)
        if rng.random() < 0.15:
            turns = [*ask("self", rng, facts)[1:], *turns]
        yield key, [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def answer_of(text: str) -> str:
    """Return what follows the last "The answer is", without the full stop; empty if the text does not say it."""
    return text.rpartition("The answer is ")[2].strip().rstrip(".") if "The answer is " in text else ""
