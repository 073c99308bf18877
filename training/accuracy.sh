#!/bin/sh
# What attention policies cost a demo model: the tables of docs/accuracy.md.
#
#   training/accuracy.sh MODEL OUT [ROWS] [TOKENS]
#
# MODEL is a checkpoint that train.py has written, OUT a directory. Needs python3 (without packages)
# and cargo, or a program that is built already in $DELTALLM. A run that was stopped goes on.
set -eu
model=$1 out=$2 rows=${3:-60} tokens=${4:-500}
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${DELTALLM:-}" ]; then
    cargo build --release --manifest-path "$root/Cargo.toml"
    DELTALLM=$root/target/release/deltallm
fi
mkdir -p "$out"

# Texts and questions from seeds that no training uses, and others to calibrate on.
python3 "$root/training/world.py" evaluate "$out/sets" --lengths "$tokens" -n "$rows" --seed 11
# Who "she" was is beyond these models in long stories: short ones, and more of them.
short=96
python3 "$root/training/world.py" evaluate "$out/short" --lengths $short -n $((rows * 5)) --seed 11
python3 "$root/training/world.py" text -n 24 --tokens "$tokens" --seed 12 > "$out/calibration.txt"

# Thresholds for each layer and KV head, for 0.57 of sparsity: 0.6 of zeros.
calibrate() { # NAME POLICY
    [ -e "$out/$1.json" ] || "$DELTALLM" calibrate --model "$model" --device cpu --length "$tokens" \
        --text "$out/calibration.txt" --sparsity 0.57 --policy "$2" --out "$out/$1.json"
}
calibrate calibrated-int4 "delta"
calibrate calibrated-f16 "paper theta=0.7sigma shape=sliding"

set -- --model "$model" --device cpu --answer-tokens 10 \
    --compare "$out/calibrated-f16.json" --compare "$out/calibrated-int4.json" \
    --compare "paper theta=0.7sigma shape=sliding reference=anchored" \
    --compare keys=int8 --compare keys=channel4 --compare keys=channel2
for theta in 0.7sigma 1sigma 1.5sigma; do
    # The paper's chain of floats over aligned blocks, and over a sliding window; and ours, 4-bit
    # differences from the mean of a page.
    set -- "$@" --compare "paper theta=$theta" --compare "paper theta=$theta shape=sliding" \
        --compare "delta theta=$theta"
done
task() { echo "$out/sets/$1-$tokens.jsonl"; }
"$DELTALLM" eval "$(task text)" "$(task choice)" "$out/short/coreference-$short.jsonl" "$(task qa)" \
    --stage prefill "$@" --out "$out/prefill"
head -n 15 "$(task text)" > "$out/sets/text-few-$tokens.jsonl" # token by token, which takes long
"$DELTALLM" eval "$(task text-few)" "$(task qa)" "$(task passkey)" \
    --stage decode "$@" --out "$out/decode"
python3 "$root/training/accuracy_table.py" "$out" > "$out/accuracy.md"
