"""Multiple-choice questions about a scene, and some without a picture, as ScienceQA has them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from dehvf_ds.demo.scenes.world import BACKGROUNDS, COLORS, RELATIONS, SHAPES, Scene


@dataclass(frozen=True)
class Question:
    """What differs from question to question; ``record`` adds the fields that ScienceQA wants beside it.

    Attributes:
        text: the question.
        right: the correct choice.
        wrong: the other choices.
        hint: text that comes with the question, or empty.
        subject: ScienceQA's subject, which decides between NAT, SOC and LAN.
        topic: topic within the subject.
        skill: what is asked for, in a few words.
        grade: 1 to 12.
        needs_picture: whether it is asked about the picture.
    """

    text: str
    right: str
    wrong: tuple[str, ...]
    hint: str
    subject: str
    topic: str
    skill: str
    grade: int
    needs_picture: bool

    def record(self, random: Random, split: str) -> dict[str, Any]:
        """The question as one entry of ``problems.json``, its choices shuffled."""
        choices = [self.right, *self.wrong]
        random.shuffle(choices)
        return {
            "question": self.text,
            "choices": choices,
            "answer": choices.index(self.right),
            "hint": self.hint,
            "image": "image.png" if self.needs_picture else None,
            "task": "closed choice",
            "grade": f"grade{self.grade}",
            "subject": self.subject,
            "topic": self.topic,
            "category": self.topic.replace("-", " ").capitalize(),
            "skill": self.skill,
            "lecture": "Look closely, name what you see and compare it with each choice."
            if self.needs_picture
            else "Read closely and compare the text with each choice.",
            "solution": f"The answer is {self.right}.",
            "split": split,
        }


def ask_about_picture(random: Random, scene: Scene) -> Question:
    """A question that only the picture can answer; one in four comes with a hint besides."""
    thing = random.choice(scene.things)
    number = ("one", "two", "three")[len(scene.things) - 1]
    hint = "The picture shows shapes on a colored background." if random.random() < 0.25 else ""
    nature = ("natural science", "physics")
    kinds: list[tuple[str, str, list[str], tuple[str, str], str, int]] = [
        (f"Which color is the {thing.shape}?", thing.color, list(COLORS), nature, "Name a color", 1),
        (f"Which shape is {thing.color}?", thing.shape, list(SHAPES), nature, "Name a shape", 2),
        ("Which color is the background?", scene.background, list(BACKGROUNDS), nature, "Name a color", 4),
        ("How many objects are there?", number, ["one", "two", "three"], nature, "Count objects", 7),
    ]
    if len(scene.things) == 2:
        first, second = (thing.shape for thing in scene.things)
        text = f"Where is the {first}, seen from the {second}?"
        place = ("social science", "geography")
        kinds.append((text, scene.relation, list(RELATIONS.values()), place, "Read directions", 8))
    text, right, choices, (subject, topic), skill, grade = random.choice(kinds)
    others = [choice for choice in choices if choice != right]
    wrong = tuple(random.sample(others, min(3, len(others))))
    return Question(text, right, wrong, hint, subject, topic, skill, grade, needs_picture=True)


def ask_in_words(random: Random, scene: Scene) -> Question:
    """A question without a picture: about a described scene, about a told map, or about words alone."""
    kind = random.choice(("scene", "map", "words"))
    if kind == "scene":
        thing = random.choice(scene.things)
        wrong = tuple(random.sample([color for color in COLORS if color != thing.color], 3))
        text, hint = f"Which color is the {thing.shape}?", scene.captions[0]
        return Question(
            text,
            thing.color,
            wrong,
            hint,
            "natural science",
            "physics",
            "Read a text",
            5,
            needs_picture=False,
        )
    if kind == "map":
        north, south = random.sample(("school", "bridge", "market", "harbor", "library", "mill"), 2)
        hint = f"The {north} lies north of the {south}."
        text, skill = "Which place lies farther south?", "Read a map"
        return Question(
            text, south, (north,), hint, "social science", "geography", skill, 9, needs_picture=False
        )
    right = random.choice(list(COLORS))
    wrong = tuple(random.sample(SHAPES, 3))
    skill = "Sort words by meaning"
    return Question(
        "Which word names a color?", right, wrong, "", "language science", "vocabulary", skill, 3, False
    )
