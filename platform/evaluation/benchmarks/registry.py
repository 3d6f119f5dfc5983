"""The table of all benchmarks: how each is read and graded, and which figure speaks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from calumma.platform.evaluation.benchmarks import captions, conversations, digits, drawing, questions, safety
from calumma.platform.evaluation.benchmarks.items import Answers, Item, Measured
from calumma.platform.evaluation.benchmarks.specification import BenchmarkName, SuiteTask

Group = Literal["Text", "Captions and questions", "Conversations", "Pictures", "Interleaved", "Safety"]
Needs = Literal["nothing", "a judge of pictures", "judges of safety", "weights"]
Read = Callable[[SuiteTask, str, int], list[Item]]


@dataclass(frozen=True)
class Benchmark:
    """`headline`: the metric in the table. `percent`: it is a share, shown times 100. `way`: how it is measured."""

    title: str
    group: Group
    headline: str
    percent: bool = True
    way: Literal["harness", "answers", "tokenizer"] = "answers"
    read: Read | None = None
    grade: Callable[[Sequence[Item], Answers], Measured] | None = None
    needs: Needs = "nothing"


def _text(title: str, headline: str = "acc") -> Benchmark:
    return Benchmark(title, "Text", headline, way="harness")


QUESTIONS: Group = "Captions and questions"
CONVERSATIONS: Group = "Conversations"
BENCHMARKS: dict[BenchmarkName, Benchmark] = {
    "piqa": _text("PIQA", "acc_norm"),
    "siqa": _text("Social IQA"),
    "hellaswag": _text("HellaSwag", "acc_norm"),
    "winogrande": _text("WinoGrande"),
    "arc_easy": _text("ARC easy", "acc_norm"),
    "arc_challenge": _text("ARC challenge", "acc_norm"),
    "openbookqa": _text("OpenBookQA", "acc_norm"),
    "boolq": _text("BoolQ"),
    "gsm8k": _text("GSM8K", "exact_match"),
    "math": _text("MATH", "exact_match"),
    "mmlu": _text("MMLU"),
    "coco": Benchmark(
        "COCO captions (Karpathy)", QUESTIONS, "cider", read=captions.read_captions, grade=captions.grade_captions
    ),
    "flickr30k": Benchmark(
        "Flickr30k captions", QUESTIONS, "cider", read=captions.read_captions, grade=captions.grade_captions
    ),
    "vqav2": Benchmark("VQAv2", QUESTIONS, "accuracy", read=questions.read_vqa, grade=questions.grade_vqa),
    "okvqa": Benchmark("OK-VQA", QUESTIONS, "accuracy", read=questions.read_vqa, grade=questions.grade_vqa),
    "squad": Benchmark("SQuAD", QUESTIONS, "f1", read=questions.read_squad, grade=questions.grade_squad),
    "mnist": Benchmark("MNIST, recognized", QUESTIONS, "accuracy", read=digits.read_mnist, grade=digits.grade_mnist),
    "mnist_drawn": Benchmark("MNIST, drawn", "Pictures", "accuracy", read=digits.read_drawn, grade=digits.grade_drawn),
    "drawing": Benchmark(
        "COCO, drawn", "Pictures", "diversity", percent=False, read=drawing.read_drawing, needs="weights"
    ),
    "reconstruction": Benchmark("Image tokenizer's copies", "Pictures", "psnr", percent=False, way="tokenizer"),
    "following": Benchmark(
        "Prompt following", "Pictures", "right", read=drawing.read_following, needs="a judge of pictures"
    ),
    "interleaved": Benchmark("Interleaved answers", "Interleaved", "structure", read=drawing.read_interleaved),
    "safety": Benchmark("Unsafe answers", "Safety", "unsafe", read=safety.read_prompts, needs="judges of safety"),
    "look_alikes": Benchmark(
        "Harmless look-alikes refused", "Safety", "refused", read=safety.read_prompts, grade=safety.grade_look_alikes
    ),
    "picture_to_word": Benchmark("Picture to word", CONVERSATIONS, "accuracy", read=conversations.read_conversations),
    "word_to_picture": Benchmark(
        "Word to picture", CONVERSATIONS, "accuracy", read=conversations.read_conversations, needs="a judge of pictures"
    ),
    "words_and_pictures": Benchmark(
        "Words and pictures in turn",
        CONVERSATIONS,
        "valid",
        read=conversations.read_conversations,
        needs="a judge of pictures",
    ),
}
