"""How many passes an image takes with drafts (speculative Jacobi decoding): `python benchmarks/drafting.py`.

A small Transformer is trained here for some minutes on handwritten digits (scikit-learn's scans, drawn 16 by 16 with 16
levels of grey: 256 codes an image), so that its codes are as predictable as images are. Then the same images are drawn
with and without drafts. Passes are counted; seconds are the least of some rounds, windows in turns, one image alone and
eight at once. Images with drafts must be those without, code for code, where both race (window 1 drafts one code).
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.generation import Engine, PhaseSampling, Request, SamplingParams
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary

SIDE, LEVELS, DIGITS = 16, 16, 10
FIRST_DIGIT, FIRST_CODE = 7, 7 + DIGITS  # ids 0..6 are special
VOCABULARY = Vocabulary(
    size=FIRST_CODE + LEVELS,
    pad=1,
    bos=0,
    eos=2,
    unknown=3,
    begin_image=4,
    end_image=5,
    end_turn=6,
    image_codes=list(range(FIRST_CODE, FIRST_CODE + LEVELS)),
)
WINDOWS = (0, 1, 4, 8, 16, 32, 64)


def sequences() -> Tensor:
    """LongTensor [images, ids]: bos, the digit, the image, eos."""
    scans = load_digits()
    images_N1HW = torch.from_numpy(scans.images / 16.0).float()[:, None]
    large = F.interpolate(images_N1HW, (SIDE, SIDE), mode="bilinear").flatten(1)
    codes_NX = (large * (LEVELS - 1)).round().long() + FIRST_CODE
    digits_N1 = torch.from_numpy(np.asarray(scans.target))[:, None] + FIRST_DIGIT
    ends = [torch.full_like(digits_N1, id) for id in (VOCABULARY.bos, VOCABULARY.begin_image, VOCABULARY.end_image)]
    return torch.cat([ends[0], digits_N1, ends[1], codes_NX, ends[2]], 1)


def trained(steps: int, width: int, layers: int) -> tuple[Transformer, float]:
    """A model of the digits, and its loss a code over the last steps in nats."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocabulary_size=VOCABULARY.size,
        layers=layers,
        width=width,
        heads=4,
        kv_heads=4,
        ffn_width=4 * width,
        context=512,
    )
    model, data = Transformer(config), sequences()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    losses = []
    for step in range(steps):
        batch = data[torch.randint(len(data), (16,))]
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {losses[-1]:.3f}", flush=True)
    return model.eval(), sum(losses[-20:]) / 20


def draw(model: Transformer, window: int, images: int, seed: int) -> tuple[list[list[int]], float, int]:
    """Images, seconds, and passes from the first code on."""
    burst = 1 if window else 8
    engine = Engine(model, VOCABULARY, SIDE * SIDE, jacobi_window=window, image_burst=burst)
    image = PhaseSampling(temperature=1.0, top_p=0.95)
    for number in range(images):
        prompt = [VOCABULARY.bos, FIRST_DIGIT + number % DIGITS]
        engine.add(Request(str(number), prompt, SamplingParams(mode="image", image=image, seed=seed + number)))
    found: list[list[int]] = [[] for _ in range(images)]
    begin = time.perf_counter()
    while engine.has_work:
        for event in engine.step():
            found[int(event.request_id)] += event.tokens
    passes = engine.statistics.counters.steps * burst
    return found, time.perf_counter() - begin, passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model, loss = trained(given.steps, given.width, given.layers)
    print(f"loss {loss:.3f} nats a code; {SIDE * SIDE} codes an image\n")
    print("| images at once | window | passes an image | fewer by | seconds | faster by | same images |")
    print("|---|---|---|---|---|---|---|")
    for images in (1, 8):
        results = {
            window: [draw(model, window, images, 100 * turn) for turn in range(given.rounds)] for window in WINDOWS
        }
        plain = min(seconds for _, seconds, _ in results[0])
        for window, rounds in results.items():
            passes = sum(count for *_, count in rounds) / len(rounds)
            seconds = min(seconds for _, seconds, _ in rounds)
            same = [a == b for (a, *_), (b, *_) in zip(rounds, results[1], strict=True)] if window else []
            fewer = SIDE * SIDE / passes
            told = f"{sum(same)} of {len(same)}" if window else ""
            row = [images, window, f"{passes:.0f}", f"{fewer:.2f}", f"{seconds:.2f}", f"{plain / seconds:.2f}", told]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
