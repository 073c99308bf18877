#!/usr/bin/env python3
"""The results of accuracy.sh as one table a stage, in Markdown.

    python3 training/accuracy_table.py OUT
"""

import json
import sys
from pathlib import Path

NAMES = {
    "keys=int8": "int8 a token",
    "keys=channel4": "4 bits a channel",
    "keys=channel2": "2 bits a channel",
}
MAIN = {"text": "perplexity", "choice": "acc_norm", "question": "f1", "passkey": "found"}


def name(policy: dict) -> str:
    """-> in the words of docs/accuracy.md"""
    if policy["name"] == "dense":
        return "dense, f32"
    if policy["policy"].split()[0] != "keys=delta":
        return NAMES[policy["policy"].split()[0]]
    field = dict(word.split("=") for word in policy["policy"].split())
    theta = "a threshold a head" if policy["thresholds"] else field["theta"].replace("sigma", " sigma")
    return f"{field['reference']}, {field['deltas']}, {field['shape']}, {theta}"


def number(estimate: dict | None, digits: int) -> str:
    if estimate is None:
        return ""
    return f"{estimate['value']:.{digits}f} ± {estimate['standard_error']:.{digits}f}"


def main() -> None:
    for stage in ["prefill", "decode"]:
        path = Path(sys.argv[1], stage, "results.json")
        tasks = json.loads(path.read_text())["results"]
        print(f"{stage}: " + ", ".join(f"{t['rows']} rows of {t['task']}" for t in tasks) + "\n")
        cells = ["policy", "zeros", "bits"]
        for task in tasks:
            title = task["task"].rsplit("-", 1)[0]
            cells += [f"{title}: {MAIN[task['kind']]}", "KL"]
        print(f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}")
        rows = zip(*(task["policies"] for task in tasks))
        for row in sorted(rows, key=lambda row: -row[0]["bits_per_key_element"]):
            first = row[0]
            zeros = "" if first["zeros"] is None else f"{100 * first['zeros']:.0f} %"
            cells = [name(first), zeros, f"{first['bits_per_key_element']:.1f}"]
            for task, policy in zip(tasks, row):
                metric = policy["metrics"][MAIN[task["kind"]]]
                cells.append(number(metric, 3 if task["kind"] == "text" else 2))
                cells.append(number(policy["kl"], 4) if first["name"] != "dense" else "")
            print(f"| {' | '.join(cells)} |")
        print()


if __name__ == "__main__":
    main()
