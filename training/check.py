#!/usr/bin/env python3
"""What a checkpoint has learned, on held-out documents of world.py, by transformers in f32.

    python training/check.py demo-llama
    python training/check.py demo-bitnet --lengths 256 1024 -n 300 --json figures.json

An answer counts if greedy decoding would give exactly it, and end there. Errors are standard errors.
"""

import argparse
import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path

# transformers wraps BitNet's quantisers in torch.compile, which saves nothing here.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import world

BATCH_TOKENS = 8192


def load(folder: Path) -> PreTrainedModel:
    """A checkpoint, computed in f32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # Of a packed BitNet this leaves norms and embedding in the dtype of the file, and .float() is
    # forbidden there.
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model


class Checker:
    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = load(folder)
        self.context = self.model.config.max_position_embeddings

    def encode(self, text: str, begin: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=begin)

    @torch.no_grad()
    def logits(self, rows: list[list[int]]) -> Iterator[Tensor]:
        """Of each row. Shorter rows are filled up behind, where nothing looks."""
        at = 0
        while at < len(rows):
            count = max(1, BATCH_TOKENS // max(len(row) for row in rows[at:]))
            part = rows[at : at + count]
            width = max(map(len, part))
            assert width <= self.context, f"{width} tokens in a context of {self.context}"
            ids = torch.tensor([row + [0] * (width - len(row)) for row in part])
            for row, logits in zip(part, self.model(ids).logits):
                yield logits[: len(row)]
            at += count

    def answers(self, rows: list[tuple[list[int], list[int]]]) -> list[bool]:
        """Of each context and answer: is every token of the answer the likeliest one?"""
        right = []
        for (context, answer), logits in zip(rows, self.logits([c + a for c, a in rows])):
            predicted = logits[len(context) - 1 : -1].argmax(-1)
            right.append(predicted.tolist() == answer)
        return right

    def perplexity(self, length: int, count: int) -> tuple[float, float, int]:
        """-> over all tokens, its standard error (texts are independent, their tokens are not), texts"""
        rows = [self.encode(row["text"]) for row in world.texts(1, count, length)]
        nats, sizes = [], []
        for row, logits in zip(rows, self.logits(rows)):
            likely = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(row[1:])[:, None])
            nats.append(-likely.sum().item())
            sizes.append(len(row) - 1)
        mean = sum(nats) / sum(sizes)
        deviation = sum((n - mean * s) ** 2 for n, s in zip(nats, sizes))
        error = math.sqrt(deviation / (count - 1) / count) / (sum(sizes) / count)
        return math.exp(mean), math.exp(mean) * error, count

    def questions(self, length: int, count: int) -> dict[str, list[bool]]:
        rows = list(world.extractive(2, count * 3 // 2, length)) + list(
            world.extractive(3, count * 3 // 2, length)
        )
        right: dict[str, list[bool]] = {"qa": [], "unanswerable": []}
        pairs = []
        for row in rows:
            answer = world.UNKNOWN if row["is_impossible"] else row["answers"]["text"][0]
            context = self.encode(world.prompt(row["context"], row["question"]))
            pairs.append((context, self.encode(f" {answer}\n", begin=False)))
        for row, ok in zip(rows, self.answers(pairs)):
            right["unanswerable" if row["is_impossible"] else "qa"].append(ok)
        return {kind: found[:count] for kind, found in right.items()}

    def choices(self, rows: list[dict]) -> list[bool]:
        pairs = [
            (self.encode(row["context"]), self.encode(choice, begin=False))
            for row in rows
            for choice in row["choices"]
        ]
        scores = []
        for (context, choice), logits in zip(pairs, self.logits([c + a for c, a in pairs])):
            likely = logits[len(context) - 1 : -1].log_softmax(-1)
            scores.append(likely.gather(-1, torch.tensor(choice)[:, None]).sum().item())
        right = []
        for row in rows:
            mine, scores = scores[: len(row["choices"])], scores[len(row["choices"]) :]
            right.append(mine.index(max(mine)) == row["label"])
        return right

    def passkeys(self, length: int, count: int) -> list[bool]:
        rows = world.passkeys(5, count, length)
        return self.answers(
            [(self.encode(r["context"]), self.encode(f" {r['answer']}\n", begin=False)) for r in rows]
        )

    def chats(self, length: int, count: int) -> list[bool]:
        """Whole sentences, with the right answers to earlier questions before them."""
        pairs: list[tuple[list[int], list[int]]] = []
        seed = world.HELD_OUT + 6 * 1_000_003
        while len(pairs) < count:
            document = world.document(random.Random(seed), length, "chat")
            seed += 1
            turns, ids = [], []
            for text, is_answer in document.pieces:
                piece = self.encode(text, begin=False)
                if is_answer and text != world.END_OF_TURN:
                    turns.append((list(ids), piece + [self.encode(world.END_OF_TURN, begin=False)[0]]))
                ids += piece
            if turns and len(ids) <= self.context:
                # One of each conversation: its questions are not independent.
                pairs.append(random.Random(seed).choice(turns))
        return self.answers(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1000])
    parser.add_argument("-n", type=int, default=200, help="questions of a kind and length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checker = Checker(args.checkpoint)

    figures: dict[str, dict] = {}
    for length in args.lengths:
        value, error, count = checker.perplexity(length, args.n)
        figures.setdefault("perplexity", {})[length] = (value, error, count)
        found = checker.questions(length, args.n)
        found["choice"] = checker.choices(list(world.multiple_choice(7, args.n, length)))
        found["coreference"] = checker.choices(list(world.coreference(4, args.n, length)))
        found["passkey"] = checker.passkeys(length, args.n)
        found["chat"] = checker.chats(length, args.n)
        for kind, right in found.items():
            share = sum(right) / len(right)
            error = math.sqrt(share * (1 - share) / len(right))
            figures.setdefault(kind, {})[length] = (share, error, len(right))

    print(f"| tokens | {' | '.join(map(str, args.lengths))} |")
    print(f"|---|{'---|' * len(args.lengths)}")
    for kind, by_length in figures.items():
        cells = [f"{value:.3f} ± {error:.3f}" for value, error, _ in by_length.values()]
        print(f"| {kind} | {' | '.join(cells)} |")
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    kind: {
                        str(length): dict(zip(("value", "standard_error", "count"), cell))
                        for length, cell in by_length.items()
                    }
                    for kind, by_length in figures.items()
                },
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
