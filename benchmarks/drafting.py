"""How many passes an image takes with drafts (speculative Jacobi decoding): `python benchmarks/drafting.py`.

A small Transformer is trained here for some minutes on handwritten digits (scikit-learn's scans, drawn 16 by 16 with 16
levels of grey: 256 codes an image), so that its codes are as predictable as images are; or `--model` takes a model
directory of the recipe in colour, which is asked for its held-out combinations. Then the same images are drawn with and
without drafts, guided and filtered as the server does by default, an engine for each window, which learns from image to
image. Passes are counted; seconds are the least of some rounds, windows in turns, one image alone and eight at once.
Images with drafts must be those without, code for code, where both race (window 1 drafts one code). "measured" is left
to the engine. `--busy` is for a machine with other work: one thread, and the seconds it computes instead of those that
pass.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.generation import Engine, Request, SamplingParams
from calumma.model.generation.passes.draft_window import MOST
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
WINDOWS = (0, 1, 8, 16, MOST, None)


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


@dataclass(frozen=True)
class Drawing:
    """A model, and the prompts of images it draws in turn."""

    transformer: Transformer
    vocabulary: Vocabulary
    codes: int
    prompts: Sequence[list[int]]
    clock: Callable[[], float] = time.perf_counter
    params: SamplingParams = field(default_factory=lambda: SamplingParams(mode="image"))

    def engine(self, window: int | None) -> Engine:
        burst = 1 if window is None or window else 8
        return Engine(self.transformer, self.vocabulary, self.codes, jacobi_window=window, image_burst=burst)

    def draw(self, engine: Engine, images: int, seed: int) -> tuple[list[list[int]], float, int]:
        """Images, seconds, and passes from the first code on."""
        before = engine.statistics.counters.steps
        for number in range(images):
            prompt = self.prompts[(seed + number) % len(self.prompts)]
            engine.add(Request(str(number), prompt, replace(self.params, seed=seed + number)))
        found: list[list[int]] = [[] for _ in range(images)]
        begin = self.clock()
        while engine.has_work:
            for event in engine.step():
                found[int(event.request_id)] += event.tokens
        seconds = self.clock() - begin
        return found, seconds, (engine.statistics.counters.steps - before) * engine.image_burst


def of_directory(directory: str) -> Drawing:
    from calumma.jobs.emoji.conversations import drawing_question
    from calumma.jobs.emoji.documents import ColourDocumentsSpecification, pictures
    from calumma.model import Document, Text, load

    model = load(directory)
    _, held_out = pictures(ColourDocumentsSpecification(storage="."))
    asked = [Document((Text(drawing_question(picture), "user"),)) for picture in held_out]
    prompts = [encoded.ids for encoded in model.encoder.encode_many(asked, complete=False)]
    return Drawing(model.transformer, model.vocabulary, model.image_length, prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a trained model directory, in place of training one")
    parser.add_argument("--busy", action="store_true", help="one thread, and the seconds that it computes")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    default = SamplingParams()
    parser.add_argument("--temperature", type=float, default=default.image.temperature)
    parser.add_argument("--guidance", type=float, default=default.guidance_text, help="by text; 1 is none")
    given = parser.parse_args()
    if given.busy:
        torch.set_num_threads(1)
    if given.model:
        drawing = of_directory(given.model)
    else:
        model, loss = trained(given.steps, given.width, given.layers)
        prompts = [[VOCABULARY.bos, FIRST_DIGIT + number] for number in range(DIGITS)]
        drawing = Drawing(model, VOCABULARY, SIDE * SIDE, prompts)
        print(f"loss {loss:.3f} nats a code")
    params = SamplingParams(
        mode="image",
        image=replace(default.image, temperature=given.temperature),
        guidance_text=given.guidance,
        guidance_image=default.guidance_image if given.guidance > 1 else 1,
    )
    drawing = replace(drawing, params=params)
    if given.busy:
        drawing = replace(drawing, clock=time.process_time)
    print(f"{drawing.codes} codes an image\n")
    print("| images at once | window | passes an image | fewer by | seconds | faster by | same images |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for images in (1, 8):
        engines = {window: drawing.engine(window) for window in WINDOWS}
        turns = [
            {window: drawing.draw(engine, images, 100 * turn) for window, engine in engines.items()}
            for turn in range(given.rounds)
        ]
        plain = min(turn[0][1] for turn in turns)
        for window in WINDOWS:
            passes = sum(turn[window][2] for turn in turns) / len(turns)
            seconds = min(turn[window][1] for turn in turns)
            same = sum(turn[window][0] == turn[1][0] for turn in turns)
            told = f"{same} of {len(turns)}" if window != 0 else ""
            name = "measured" if window is None else window
            row = [images, name, f"{passes:.0f}", f"{drawing.codes / passes:.2f}", f"{seconds:.2f}"]
            print("| " + " | ".join(map(str, [*row, f"{plain / seconds:.2f}", told])) + " |", flush=True)


if __name__ == "__main__":
    main()
