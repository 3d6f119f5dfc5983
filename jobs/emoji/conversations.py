"""What is asked about pictures in colour, and how captions and stories tell them.

The first wording of each kind is the one that the evaluation and the quickstart's own questions use.
"""

from __future__ import annotations

from collections.abc import Sequence

from calumma.jobs.emoji.pictures import Picture
from calumma.jobs.quickstart.conversations import IMAGE_MARK, Conversation

CAPTIONS = ("{a_thing}, in the style of {style}", "{thing}, {style}", "a picture of {thing} in the style of {style}")
RECOGNITION = ("What is this? <image>", "<image> What is this?", "What does the picture show? <image>")
STYLE = ("In which style is this? <image>", "<image> Whose style is this?")
DRAWING = ("Draw {a_thing}, in the style of {style}.", "Please draw {thing} in the style of {style}.")
# Chat clients, and the quickstart's own questions, send a picture after the words or before them.
SKIN = ("The same with {skin} skin. <image>", "<image> The same with {skin} skin.", "Give this {skin} skin: <image>")
RESTYLED = (
    "The same in the style of {style}. <image>",
    "<image> The same in the style of {style}.",
    "Draw this in the style of {style}: <image>",
)
STORY = ("Tell of {a_first} and {a_second}, with pictures in the style of {style}.",)
KEYWORDS = ("Which words go with {thing}?", "Give keywords for {thing}.")
# Pages name two things of one group; a group that is not here gets the last opening.
OPENINGS = {"Food & Drink": "On the table, by {style}: ", "Animals & Nature": "Out in the open, by {style}: "}
OTHER_OPENING = "A picture book by {style}: "


def with_article(phrase: str) -> str:
    """`a red apple`, `an owl`; what is many (`grapes`, `thumbs up`) or has its article goes without."""
    words = phrase.split()
    many = any(word.endswith("s") and not word.endswith(("ss", "us")) for word in (words[0], words[-1]))
    if many or not phrase[0].islower():
        return phrase
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def caption(picture: Picture, wording: int = 0) -> str:
    return CAPTIONS[wording].format(thing=picture.phrase, a_thing=with_article(picture.phrase), style=picture.style)


def recognition_chat(picture: Picture, wording: int = 0) -> Conversation:
    return Conversation(RECOGNITION[wording], picture.phrase, (picture,))


def style_chat(picture: Picture, wording: int = 0) -> Conversation:
    return Conversation(STYLE[wording], picture.style, (picture,))


def drawing_question(picture: Picture, wording: int = 0) -> str:
    return DRAWING[wording].format(thing=picture.phrase, a_thing=with_article(picture.phrase), style=picture.style)


def drawing_chat(picture: Picture, wording: int = 0) -> Conversation:
    return Conversation(drawing_question(picture, wording), IMAGE_MARK, (picture,))


def edit_question(before: Picture, after: Picture, wording: int = 0) -> str:
    """What makes one picture of another: its skin, or its style."""
    if before.style != after.style:
        return RESTYLED[wording].format(style=after.style)
    return SKIN[wording].format(skin=after.skin)


def edit_chat(before: Picture, after: Picture, wording: int = 0) -> Conversation:
    return Conversation(edit_question(before, after, wording), IMAGE_MARK, (before, after))


def story_question(first: Picture, second: Picture) -> str:
    return STORY[0].format(a_first=with_article(first.phrase), a_second=with_article(second.phrase), style=first.style)


def story_chat(first: Picture, second: Picture) -> Conversation:
    """Both named, each before its picture."""
    answer = f"{first.phrase} {IMAGE_MARK} {second.phrase} {IMAGE_MARK}"
    return Conversation(story_question(first, second), answer, (first, second))


def keyword_chat(picture: Picture, wording: int = 0) -> Conversation:
    return Conversation(KEYWORDS[wording].format(thing=picture.thing), ", ".join(picture.keywords))


def opening(pair: Sequence[Picture]) -> str:
    return OPENINGS.get(pair[0].group, OTHER_OPENING).format(style=pair[0].style)
