#!/usr/bin/env python3
"""Trains a small Llama or BitNet b1.58 on the stories of world.py, from nothing, on a CPU.

    python training/train.py llama --out demo-llama
    python training/train.py bitnet --out demo-bitnet --minutes 60

--out becomes a checkpoint as transformers lays it out. A BitNet is written twice: its master
weights, and packed at 2 bits a weight in OUT-packed. Both are written again every few minutes.
"""

import argparse
import json
import math
import os
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

# Threads that wait should sleep: where others compute too, spinning costs most of the speed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

import world

CONTEXT = 1024
VOCABULARY = 1300
SPECIALS = [world.BEGIN, world.END, world.END_OF_TURN]  # the first ids

# Document length, share of the tokens, tokens a step, share of dense documents. Retrieval appears
# soonest where documents are short and ask about all they tell; long ones cost more a token.
CURRICULUM = [
    (64, 0.25, 2048, 1.0),
    (128, 0.25, 2048, 0.6),
    (256, 0.25, 4096, 0.4),
    (512, 0.15, 8192, 0.3),
    (1024, 0.10, 8192, 0.3),
]
# Of the steps after --init: those of any length of the curriculum, so that none is forgotten.
REPEATED = 0.35
ANSWER_WEIGHT = 4.0
WARM_UP = 40  # steps
MUON_RATE = {"llama": 0.012, "bitnet": 0.01}
ADAM_RATE = 0.003


# ------------------------------------------------------------------------------ tokenizer

# As Llama 3 splits, but a number into its digits.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def train_tokenizer() -> Tokenizer:
    """Byte-level, so that any text can be encoded and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    corpus = [
        "".join(text for text, _ in world.document(rng, 256).pieces if text not in SPECIALS)
        for _ in range(6000)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIALS],
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.removeprefix(world.BEGIN) for text in corpus), trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{world.BEGIN} $A",
                pair=f"{world.BEGIN} $A {world.BEGIN}:1 $B:1",
                special_tokens=[(world.BEGIN, 0)],
            ),
        ]
    )
    assert [tokenizer.token_to_id(s) for s in SPECIALS] == [0, 1, 2]
    for text in ["Where, in 1984? At café Ærø,\n\n 漢字  👍🏽\t\u0000 end ", *corpus[:100]]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    return tokenizer


# ------------------------------------------------------------------------------ batches


def encode(tokenizer: Tokenizer, document: world.Document) -> tuple[list[int], list[float]]:
    """-> ids, and the weight of each in the loss. (Pieces end where words end, so that they can be
    encoded one by one.)"""
    texts = [text for text, _ in document.pieces]
    ids: list[int] = []
    weights: list[float] = []
    for encoding, (_, is_answer) in zip(
        tokenizer.encode_batch_fast(texts, add_special_tokens=False), document.pieces
    ):
        ids += encoding.ids
        weights += [ANSWER_WEIGHT if is_answer else 1.0] * len(encoding.ids)
    return ids, weights


def batch(
    rng: random.Random,
    tokenizer: Tokenizer,
    length: int,
    rows: int,
    kind: str | None = None,
    dense: float = 0.0,
    deeds: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One document a row: nothing of another one to be confused with, no masks. -> ids with one more
    column than `length`, and the weight of each prediction."""
    ids = torch.full((rows, length + 1), 1)
    weights = torch.zeros(rows, length + 1)
    for row in range(rows):
        while True:
            document, w = encode(tokenizer, world.document(rng, length, kind, dense, deeds))
            if len(document) <= length + 1:
                break
        ids[row, : len(document)] = torch.tensor(document)
        weights[row, : len(document)] = torch.tensor(w)
    return ids, weights[:, 1:]


# ------------------------------------------------------------------------------ model


@dataclass(frozen=True)
class Shape:
    vocabulary: int
    bitnet: bool
    hidden: int = 256
    intermediate: int = 640
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    context: int = CONTEXT
    rope_theta: float = 10000.0
    eps: float = 1e-5


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations in 8 bits by the greatest of each token, as BitNet b1.58 2B4T has them. The
    rounding is invisible to gradients. -> whole numbers, and what they were multiplied by."""
    x = x.float()
    scale = 127 / x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    scaled = x * scale
    return scaled + (scaled.round().clamp(-128, 127) - scaled).detach(), scale


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in {-1, 0, 1} by the mean of |weight|. -> whole numbers, and that mean."""
    mean = weight.detach().abs().mean().clamp(min=1e-5)
    scaled = weight / mean
    return scaled + (scaled.round().clamp(-1, 1) - scaled).detach(), mean


class Linear(nn.Module):
    """Multiplies by a matrix, in a BitNet by its ternary image. A bf16 product of these whole
    numbers is exact, since it is summed in f32."""

    def __init__(self, inputs: int, outputs: int, bitnet: bool, gain: float = 1.0) -> None:
        super().__init__()
        self.bitnet = bitnet
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * gain * 0.5 / math.sqrt(inputs))

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        if not self.bitnet:
            return F.linear(x, self.weight)
        x, scale = x
        weight, mean = ternary(self.weight)
        return F.linear(x, weight).float() * (mean / scale)


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
        self.q_proj = Linear(s.hidden, width, s.bitnet)
        self.k_proj = Linear(s.hidden, kv_width, s.bitnet)
        self.v_proj = Linear(s.hidden, kv_width, s.bitnet)
        self.o_proj = Linear(width, s.hidden, s.bitnet, 1 / math.sqrt(2 * s.layers))
        if s.bitnet:
            self.attn_sub_norm = Norm(width, s.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s = self.shape
        x = quantised(x) if s.bitnet else x
        q = rotate(self.q_proj(x).unflatten(-1, (s.heads, s.head_dim)).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).unflatten(-1, (s.kv_heads, s.head_dim)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).unflatten(-1, (s.kv_heads, s.head_dim)).transpose(1, 2)
        group = s.heads // s.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        # (rotate and the scales of a BitNet leave f32 behind, which autocast does not see.)
        q, k, v = (t.bfloat16() if torch.is_autocast_enabled("cpu") else t.float() for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        return self.o_proj(quantised(self.attn_sub_norm(y)) if s.bitnet else y)


class Mlp(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.bitnet = s.bitnet
        self.gate_proj = Linear(s.hidden, s.intermediate, s.bitnet)
        self.up_proj = Linear(s.hidden, s.intermediate, s.bitnet)
        self.down_proj = Linear(s.intermediate, s.hidden, s.bitnet, 1 / math.sqrt(2 * s.layers))
        if s.bitnet:
            self.ffn_sub_norm = Norm(s.intermediate, s.eps)

    def forward(self, x: Tensor) -> Tensor:
        if not self.bitnet:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        x = quantised(x)
        y = F.relu(self.gate_proj(x)).square() * self.up_proj(x)
        return self.down_proj(quantised(self.ffn_sub_norm(y)))


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(s.hidden, s.eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = Norm(s.hidden, s.eps)
        self.mlp = Mlp(s)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), cos, sin)
        return h + self.mlp(self.post_attention_layernorm(h))


class Model(nn.Module):
    """Names are those of transformers, so that state_dict is what goes to the file."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(s.vocabulary, s.hidden)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.1)
        self.model.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.model.norm = Norm(s.hidden, s.eps)
        self.lm_head = nn.Linear(s.hidden, s.vocabulary, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.5 / math.sqrt(s.hidden))
        frequency = s.rope_theta ** -(torch.arange(0, s.head_dim, 2) / s.head_dim)
        angles = torch.arange(s.context)[:, None] * frequency
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        h = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            h = layer(h, cos, sin)
        return self.lm_head(self.model.norm(h)).float()

    def loss(self, ids: Tensor, weights: Tensor) -> Tensor:
        logits = self(ids[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return x.float() * cos + torch.cat([-b, a], -1) * sin


# ------------------------------------------------------------------------------ optimiser


class Muon:
    """Momentum whose singular values are all brought near one (https://kellerjordan.github.io/posts/muon).
    Matrices of one shape go together. The factor gives a step the size of one of AdamW."""

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95, decay: float = 0.1) -> None:
        self.momentum, self.decay = momentum, decay
        self.groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for matrix in matrices:
            rows, columns = matrix.shape
            self.groups.setdefault((min(rows, columns), max(rows, columns)), []).append(matrix)
        self.state = {shape: torch.zeros(len(m), *shape) for shape, m in self.groups.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, matrices in self.groups.items():
            wide = lambda t: t if t.shape[0] <= t.shape[1] else t.T
            gradient = torch.stack([wide(m.grad) for m in matrices])
            state = self.state[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp_(state, self.momentum)).float()
            update *= rate * 0.2 * math.sqrt(shape[1])
            for matrix, change in zip(matrices, update):
                matrix.mul_(1 - rate * self.decay)
                matrix.sub_(change if matrix.shape[0] <= matrix.shape[1] else change.T)
                matrix.grad = None


def orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz iteration towards U V^T of x = U S V^T; bf16 is enough."""
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


# ------------------------------------------------------------------------------ files


def pack(matrix: Tensor) -> Tensor:
    """Four rows in a byte; the rows of one byte lie a quarter of the matrix apart."""
    quarters = (matrix + 1).to(torch.uint8).reshape(4, matrix.shape[0] // 4, matrix.shape[1])
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same model with its body matrices as ternary bytes and a scale."""
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor
        if name.endswith("_proj.weight"):
            weight, mean = ternary(tensor.float())
            result[name] = pack(weight.round())
            result[name + "_scale"] = mean.reshape(1).to(tensor.dtype)
    return result


def unpacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `packed` has made, as floats; whatever is not packed stays as it is."""
    result = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.uint8:
            trits = torch.cat([tensor >> shift & 3 for shift in (0, 2, 4, 6)]).float() - 1
            # So that the mean of the magnitudes, zeros included, is the scale again.
            result[name] = trits * tensors[name + "_scale"].float() / trits.abs().mean()
        elif not name.endswith("_scale"):
            result[name] = tensor.float()
    return result


@torch.no_grad()
def as_llama(tensors: dict[str, Tensor], shape: Shape, ids: Tensor) -> dict[str, Tensor]:
    """What a BitNet's weights, as their ternary images, are worth in a Llama: a beginning that looks
    back already. The Llama has no sub-norms: their weights go into the projections behind them, and so do their divisors as
    they are on average over `ids`, after SiLU for the feed-forward block."""
    bitnet = Model(replace(shape, bitnet=True))
    bitnet.load_state_dict(tensors)
    result = {name: t.clone() for name, t in tensors.items() if "_sub_norm" not in name}
    for name in result:
        if name.endswith("_proj.weight"):
            whole, mean = ternary(result[name])
            result[name] = whole * mean
    rms = lambda x: x.float().square().mean().sqrt()
    for i, layer in enumerate(bitnet.model.layers):

        def attended(module: nn.Module, inputs: tuple[Tensor], name: str = f"model.layers.{i}.self_attn") -> None:
            result[f"{name}.o_proj.weight"] *= module.weight / rms(inputs[0])

        def gated(mlp: nn.Module, inputs: tuple[Tensor], name: str = f"model.layers.{i}.mlp") -> None:
            x = quantised(inputs[0])
            y = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
            result[f"{name}.down_proj.weight"] *= mlp.ffn_sub_norm.weight / rms(y)

        layer.self_attn.attn_sub_norm.register_forward_pre_hook(attended)
        layer.mlp.register_forward_pre_hook(gated)
    bitnet(ids)
    return result


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write(folder: Path, model: Model, tokenizer: Tokenizer, quantization: dict | None = None) -> None:
    s = model.shape
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["BitNetForCausalLM" if s.bitnet else "LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "hidden_act": "relu2" if s.bitnet else "silu",
        "hidden_size": s.hidden,
        "initializer_range": 0.02,
        "intermediate_size": s.intermediate,
        "max_position_embeddings": s.context,
        "model_type": "bitnet" if s.bitnet else "llama",
        "num_attention_heads": s.heads,
        "num_hidden_layers": s.layers,
        "num_key_value_heads": s.kv_heads,
        "rms_norm_eps": s.eps,
        "rope_theta": s.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": s.vocabulary,
    }
    if not s.bitnet:
        config |= {"head_dim": s.head_dim, "mlp_bias": False, "rope_scaling": None}
    tensors = {name: t.detach().bfloat16().contiguous() for name, t in model.state_dict().items()}
    if quantization:
        config["quantization_config"] = quantization
        if quantization["quantization_mode"] == "offline":
            tensors = packed(tensors)
    write_json(folder / "config.json", config)
    generation = {"bos_token_id": 0, "eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    write_json(folder / "generation_config.json", generation)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(i): {
                    "content": s,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for i, s in enumerate(SPECIALS)
            },
            "bos_token": world.BEGIN,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": world.END,
            "model_max_length": CONTEXT,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    # Whoever reads while this writes finds the old or the new weights, never half of them.
    unfinished = folder / "model.safetensors.tmp"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)
    unfinished.replace(folder / "model.safetensors")


def write_all(out: Path, model: Model, tokenizer: Tokenizer) -> None:
    if not model.shape.bitnet:
        write(out, model, tokenizer)
        return
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    write(out, model, tokenizer, quantization | {"quantization_mode": "online"})
    write(
        out.with_name(out.name + "-packed"),
        model,
        tokenizer,
        quantization | {"quantization_mode": "offline"},
    )


# ------------------------------------------------------------------------------ training


@torch.no_grad()
def progress_report(model: Model, tokenizer: Tokenizer, length: int) -> str:
    """Held-out answers of which every token is the likeliest, by kind of document; and "unknown"."""
    unknown = tokenizer.encode(f" {world.UNKNOWN}", add_special_tokens=False).ids[0]
    report, unanswerable = [], []
    for kind in ["dense", "qa", "coreference", "passkey", "chat"]:
        rng = random.Random(world.HELD_OUT)
        ids, weights = batch(rng, tokenizer, length, max(8, 4096 // length), kind)
        right, answer = model(ids[:, :-1]).argmax(-1) == ids[:, 1:], weights > 1
        begins = answer.clone()
        begins[:, 1:] &= ~answer[:, :-1]
        # Wrong tokens of answers so far: an answer is right if none comes up within it.
        wrong = (answer & ~right).cumsum(-1)
        number = begins.cumsum(-1)
        found = []
        for row, start in begins.nonzero().tolist():
            end = start + int((answer[row] & (number[row] == number[row, start])).sum())
            ok = float(wrong[row, end - 1] == wrong[row, start - 1])
            (unanswerable if ids[row, start + 1] == unknown else found).append(ok)
        report.append(f"{kind} {sum(found) / max(len(found), 1):.3f}")
    return ", ".join(report) + f", {world.UNKNOWN} {sum(unanswerable) / max(len(unanswerable), 1):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=list(MUON_RATE))
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--tokens", type=float, default=13e6, help="how many to train on")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="hurry, on a slow or busy machine, to end by then"
    )
    parser.add_argument(
        "--init",
        type=Path,
        help="begin with tokenizer and weights of this checkpoint, packed or not; a Llama may begin with a BitNet",
    )
    parser.add_argument(
        "--from-length", type=int, default=0, help="leave out the shorter documents of the curriculum"
    )
    parser.add_argument(
        "--deeds", type=float, default=0.0, metavar="SHARE", help='documents only about who "she" was'
    )
    parser.add_argument("--to-length", type=int, default=CONTEXT, help="leave out the longer ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=float, default=5, metavar="MINUTES")
    parser.add_argument("--rate", type=float, help="Muon's learning rate")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--f32", action="store_true", help="no bf16: for CPUs without it")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=not args.f32)
    rng = random.Random(args.seed)
    tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json")) if args.init else train_tokenizer()
    shape = Shape(tokenizer.get_vocab_size(), bitnet=args.model == "bitnet")
    model = Model(shape)
    if args.init:
        tensors = unpacked(load_file(args.init / "model.safetensors"))
        if not shape.bitnet and any("_sub_norm" in name for name in tensors):
            tensors = as_llama(tensors, shape, batch(random.Random(args.seed), tokenizer, 256, 32)[0][:, :-1])
        model.load_state_dict(tensors)
    matrices = [p for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    others = [p for n, p in model.named_parameters() if not n.endswith("_proj.weight")]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, vocabulary {shape.vocabulary}"
    )

    curriculum = [phase for phase in CURRICULUM if args.from_length <= phase[0] <= args.to_length]
    shares = sum(share for _, share, _, _ in curriculum)
    loss_of = model.loss if args.no_compile else torch.compile(model.loss, dynamic=False)
    muon_rate = args.rate or MUON_RATE[args.model]
    start = saved = time.monotonic()
    step, tokens, reported, average, length = 0, 0, 0, 0.0, 0
    while True:
        now = time.monotonic()
        done = max(tokens / args.tokens, (now - start) / 60 / args.minutes)
        finished = done >= 1
        if finished or tokens >= reported + 500_000:
            with autocast:
                accuracy = progress_report(model, tokenizer, length)
            print(
                f"{(now - start) / 60:.1f} min, step {step}, {tokens / 1e6:.2f} M tokens, length {length}, "
                f"loss {average:.3f}; held-out answers: {accuracy}",
                flush=True,
            )
            reported = tokens
        if finished or now - saved > 60 * args.save_every:
            write_all(args.out, model, tokenizer)
            saved = now
        if finished:
            break

        before, share = length, 0.0
        for length, part, size, dense in curriculum:
            share += part / shares
            if done < share:
                break
        if length != before:
            average = 0.0
        width = length
        if args.init and rng.random() < REPEATED:
            often = [part / size for _, part, size, _ in curriculum]
            width, _, size, dense = rng.choices(curriculum, often)[0]
        rate = min((step + 1) / WARM_UP, 1.0, max(0.01, 2 * (1 - done)))
        ids, weights = batch(rng, tokenizer, width, size // width, dense=dense, deeds=args.deeds)
        with autocast:
            loss = loss_of(ids, weights)
        loss.backward()
        muon.step(muon_rate * rate)
        adam.param_groups[0]["lr"] = ADAM_RATE * rate
        adam.step()
        adam.zero_grad()
        value = loss.item()
        average = value if average == 0.0 else 0.98 * average + 0.02 * value
        step, tokens = step + 1, tokens + ids[:, 1:].numel()
        if step == 1 or step % 25 == 0:
            print(f"{time.monotonic() - start:.0f} s, step {step}, loss {average:.3f}", flush=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
