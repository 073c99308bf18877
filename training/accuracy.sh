#!/bin/sh
# What attention policies cost a demo model: the tables of docs/accuracy.md.
#
#   training/accuracy.sh MODEL OUT [ROWS]
#
# MODEL is a checkpoint that train.py has written, OUT a directory. Needs python3 (no packages) and
# cargo. A run that was stopped goes on from where it was.
set -eu
model=$1 out=$2 rows=${3:-100}
root=$(cd "$(dirname "$0")/.." && pwd)
cargo build --release --manifest-path "$root/Cargo.toml"
deltallm=$root/target/release/deltallm
mkdir -p "$out"

# Texts and questions of about 1000 tokens, from seeds that no training uses; others to calibrate on.
python3 "$root/training/world.py" evaluate "$out/sets" --lengths 1000 -n "$rows" --seed 1
python3 "$root/training/world.py" text -n 24 --tokens 1000 --seed 2 > "$out/calibration.txt"

# Thresholds for each layer and KV head, at the zeros that 0.7 sigma gives everywhere.
calibrate() { # NAME POLICY
    [ -e "$out/$1.json" ] || "$deltallm" calibrate --model "$model" --device cpu --text \
        "$out/calibration.txt" --sparsity 0.57 --policy "$2" --out "$out/$1.json"
}
calibrate calibrated-int4 "delta"
calibrate calibrated-f16 "paper theta=0.7sigma shape=sliding"

set -- "$out/sets/text-1000.jsonl" "$out/sets/choice-1000.jsonl" "$out/sets/coreference-1000.jsonl" \
    "$out/sets/qa-1000.jsonl" "$out/sets/passkey-1000.jsonl" \
    --model "$model" --device cpu --stage both --answer-tokens 10 --length 1024
for theta in 0.5sigma 0.7sigma 1sigma 1.5sigma; do
    # The paper's chain of floats over aligned blocks, and over a sliding window.
    set -- "$@" --compare "paper theta=$theta" --compare "paper theta=$theta shape=sliding"
    # Ours: 4-bit differences from the mean of a page.
    set -- "$@" --compare "delta theta=$theta"
done
set -- "$@" --compare "paper theta=0.7sigma shape=sliding reference=anchored" \
    --compare "$out/calibrated-f16.json" --compare "$out/calibrated-int4.json" \
    --compare keys=int8 --compare keys=channel4 --compare "keys=channel2 page=16" --compare keys=channel2
"$deltallm" eval "$@" --out "$out/results"
