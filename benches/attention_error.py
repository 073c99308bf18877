"""What a policy costs in accuracy, against the bits that a key takes.

    cargo build --release
    python benches/attention_error.py target/release/deltallm MODEL TEXTS [-n 12] [--device cpu]

MODEL is a model directory, TEXTS a JSONL file whose lines have a field `text`. Every text, cut to
the model's context, is run as one prompt with dense attention in f32 and with each policy. Printed
are the mean KL divergence to dense, in nats a token, the relative change of perplexity, and zeros
and bits a key element as the program counts them from its pages. Needs numpy, safetensors and
tokenizers from PyPI.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

POLICIES = [
    "keys=int8",
    "keys=channel4",
    "keys=channel4 page=128",
    "keys=channel2 page=16",
    "keys=channel2 page=32",
    "keys=channel2",
    "keys=channel2 page=128",
    *[f"delta deltas=f16 theta={theta}sigma" for theta in (0.3, 0.5, 0.7, 1)],
    *[f"delta deltas=int8 theta={theta}sigma" for theta in (0.3, 0.5, 0.7, 1)],
    *[f"delta deltas=int4 theta={theta}sigma" for theta in (0.3, 0.5, 0.7, 1, 1.5)],
    *[f"delta deltas=int4 page=128 theta={theta}sigma" for theta in (0.3, 0.5, 0.7, 1, 1.3)],
    *[f"delta reference=continuous deltas=f16 theta={theta}sigma" for theta in (0.5, 0.7, 1)],
    *[f"delta reference=continuous deltas=int4 theta={theta}sigma" for theta in (0.7, 1)],
    "delta reference=anchored deltas=f16 theta=1sigma",
    "delta shape=block theta=0.7sigma",
    "paper",
    "paper theta=1.5",
    "dense values=int8",
    "dense values=int4",
    "keys=channel4 values=int4",
    "delta deltas=int4 theta=0.7sigma values=int4",
]


class Program:
    """The program with a model."""

    def __init__(self, path: str, model: str, device: str) -> None:
        self.path, self.model, self.device = path, model, device
        self.tokenizer = Tokenizer.from_file(str(Path(model, "tokenizer.json")))
        self.context = json.loads(Path(model, "config.json").read_text())["max_position_embeddings"]

    def run(self, command: str, *options: str) -> str:
        words = [self.path, command, "--model", self.model, "--device", self.device, *options]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    def log_probabilities(self, ids: list[int], policy: str, folder: str) -> np.ndarray:
        """Of every next token, `[tokens, vocabulary]`."""
        ids_path, out = Path(folder, "ids"), str(Path(folder, "logits"))
        ids_path.write_text(" ".join(map(str, ids)))
        self.run("logits", "--ids", str(ids_path), "--out", out, "--policy", policy)
        logits = load_file(out)["logits"].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def counts(self, text: str, policy: str, folder: str) -> dict:
        path = Path(folder, "text")
        path.write_text(text)
        options = ["--file", str(path), "-n", "1", "--json", "--policy", policy]
        return json.loads(self.run("generate", *options))["cache"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("model")
    parser.add_argument("texts")
    parser.add_argument("-n", type=int, default=12, help="texts")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    program = Program(args.program, args.model, args.device)
    lines = Path(args.texts).read_text().splitlines()[: args.n]
    ids = [program.tokenizer.encode(json.loads(line)["text"]).ids for line in lines]
    # One place is left for the token that `generate` makes.
    ids = [tokens[: program.context - 1] for tokens in ids]

    def loss(log_p: list[np.ndarray]) -> float:
        pairs = [lp[np.arange(len(t) - 1), t[1:]] for lp, t in zip(log_p, ids)]
        return -np.concatenate(pairs).mean()

    with tempfile.TemporaryDirectory() as folder:
        dense = [program.log_probabilities(t, "dense exact=f32", folder) for t in ids]
        dense_loss = loss(dense)
        print(f"{sum(map(len, ids))} tokens, perplexity {np.exp(dense_loss):.3f}\n")
        print("| policy | zeros | bits a key element | KL | perplexity |\n|---|---|---|---|---|")
        for policy in POLICIES:
            found = [program.log_probabilities(t, policy, folder) for t in ids]
            kl = np.concatenate([(np.exp(d) * (d - f)).sum(-1) for d, f in zip(dense, found)])
            change = 100 * (np.exp(loss(found) - dense_loss) - 1)
            text = program.tokenizer.decode(ids[0], skip_special_tokens=True)
            counts = program.counts(text, policy, folder)
            zeros, bits = counts["zeros"], counts["bits_per_key_element"]
            zeros = "-" if zeros is None else f"{100 * zeros:.0f} %"
            bits = "16" if bits is None else f"{bits:.2f}"
            error = 2 * kl.std() / np.sqrt(len(kl))
            print(f"| {policy} | {zeros} | {bits} | {kl.mean():.5f} ± {error:.5f} | {change:+.2f} % |")


if __name__ == "__main__":
    main()
