"""What the quickstart measures, and what of it is meant to be reached."""

from __future__ import annotations

TARGETS = {"recognition_accuracy": 0.90, "generation_accuracy": 0.85, "interleaved_valid": 1.0}
MEASURED = {
    "recognition_accuracy": "Recognition: held-out scan to word",
    "generation_accuracy": "Generation: word to picture, judged",
    "judge_accuracy": "The judge itself, on held-out scans",
    "interleaved_valid": "Interleaved: alternation valid",
    "interleaved_words": "Interleaved: all words right",
    "interleaved_digits": "Interleaved: pictures right, judged",
    "image_reconstruction_error": "Image tokenizer: squared error, held out",
    "codebook_used": "Image tokenizer: codes in use",
}
FROM_IMAGE_TOKENIZER = ("image_reconstruction_error", "codebook_used")


def goal(name: str) -> str:
    """A target in few characters."""
    return f"≥ {TARGETS[name]:.0%}" if TARGETS[name] < 1 else "100%"


def shown(name: str, value: float) -> str:
    """A result as people read it."""
    return f"{value:.4f}" if name == "image_reconstruction_error" else f"{value:.1%}"
