#!/usr/bin/env python3
"""That stories say what their questions ask, and that what is trained is what transformers computes.

python training/test.py
"""

import random
import tempfile
from pathlib import Path

import check  # before torch, since it sets what torch reads from the environment

import torch
from transformers import AutoTokenizer

import train
import world


def test_documents(tokenizer) -> None:
    for length in [128, 256, 512, 1024]:
        for kind in [*world.KINDS, world.DENSE]:
            over = 0
            for seed in range(40):
                document = world.document(random.Random(seed), length, kind)
                assert document == world.document(random.Random(seed), length, kind), "not deterministic"
                joint = tokenizer.encode(document.text, add_special_tokens=False).ids
                ids, weights = train.encode(tokenizer, document)
                assert ids == joint, "a piece ends within a token"
                assert (max(weights) > 1) == (kind != "story")
                over += len(ids) > length + 1
                if kind in ("qa", "passkey", "dense"):
                    text = document.text.split("\n\nQuestion:")[0]
                    for answer, is_answer in document.pieces:
                        answer = answer.strip()
                        assert not is_answer or answer == world.UNKNOWN or answer in text, document.text
            assert over <= 20, f"{over} of 40 {kind} documents do not fit {length} tokens"


def test_evaluation_sets() -> None:
    for length in [128, 1000]:
        for row in world.extractive(0, 60, length):
            for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"]):
                assert row["context"][start : start + len(text)] == text
            assert row["is_impossible"] == (not row["answers"]["text"])
        for row in world.passkeys(0, 25, length):
            story = row["context"].split("\n\nQuestion:")[0]
            found = story.index(row["answer"]) / len(story)
            assert abs(found - row["depth"]) < 0.35, (found, row["depth"])
        for row in world.coreference(0, 20, length):
            assert len(set(row["choices"])) == 2 and all(c in row["context"] for c in row["choices"])
        for row in world.multiple_choice(0, 60, length):
            assert len(set(row["choices"])) == 4 and row["choices"][row["label"]] in row["context"]


@torch.no_grad()
def test_packing() -> None:
    tensors = train.Model(train.Shape(100, bitnet=True)).state_dict()
    again = train.unpacked(train.packed(tensors))
    for name in (name for name in tensors if name.endswith("_proj.weight")):
        (trits, scale), (same, close) = train.ternary(tensors[name]), train.ternary(again[name])
        assert torch.equal(trits, same) and abs(scale - close) < 0.01 * scale, name


@torch.no_grad()
def test_against_transformers(tokenizer, folder: Path) -> None:
    ids = torch.randint(3, 1000, (1, 70), generator=torch.Generator().manual_seed(0))
    for bitnet in [False, True]:
        torch.manual_seed(1)
        model = train.Model(train.Shape(tokenizer.get_vocab_size(), bitnet))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            parameter.copy_(parameter.bfloat16())  # as it is written
        expected = model(ids)
        out = folder / ("bitnet" if bitnet else "llama")
        train.write_all(out, model, tokenizer)
        # A packed scale is rounded to bf16, so the packed form agrees less closely.
        for path, tolerance in [(out, 2e-3), (folder / "bitnet-packed", 0.2)][: 1 + bitnet]:
            difference = (check.load(path)(ids).logits - expected).abs().max().item()
            print(f"{path.name}: logits deviate by {expected.std():.2f}, differ by at most {difference:.1e}")
            assert difference < tolerance
        loaded = AutoTokenizer.from_pretrained(out)
        assert loaded("Anna, 42").input_ids == tokenizer.encode("Anna, 42").ids
        chat = [{"role": "user", "content": "Hello!"}]
        text = loaded.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert text == "<|begin_of_text|>User: Hello!<|eot_id|>Assistant:"


def main() -> None:
    tokenizer = train.train_tokenizer()
    test_documents(tokenizer)
    test_evaluation_sets()
    test_packing()
    with tempfile.TemporaryDirectory() as folder:
        test_against_transformers(tokenizer, Path(folder))
    print("all well")


if __name__ == "__main__":
    main()
