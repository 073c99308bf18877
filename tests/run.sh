#!/bin/sh
# Runs every test on Linux or macOS. GPU tests need an adapter: where a Linux machine has none, this
# installs Mesa's software Vulkan driver (Debian, Ubuntu, Fedora, Arch, Alpine). Arguments go to
# `cargo test`.
set -eu
cd "$(dirname "$0")/.."

# Without it Mesa writes a line to standard error for each device it opens.
export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/tmp}"

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

install_software_vulkan() {
    echo "no Vulkan driver found: installing Mesa's software driver" >&2
    if command -v apt-get >/dev/null; then
        as_root apt-get update
        as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y --no-install-recommends mesa-vulkan-drivers libvulkan1
    elif command -v dnf >/dev/null; then
        as_root dnf install -y mesa-vulkan-drivers vulkan-loader
    elif command -v pacman >/dev/null; then
        as_root pacman -S --noconfirm vulkan-swrast vulkan-icd-loader
    elif command -v apk >/dev/null; then
        as_root apk add mesa-vulkan-swrast vulkan-loader
    else
        echo "please install a Vulkan driver, such as Mesa's lavapipe, and run this again" >&2
        exit 1
    fi
}

# A C linker is all that Rust itself leaves to the system.
if ! command -v cc >/dev/null && command -v apt-get >/dev/null; then
    as_root apt-get update
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev
fi

if [ "$(uname -s)" = Linux ]; then
    # `devices --check` fails where no adapter, hardware or software, can be opened.
    cargo build --quiet
    if ! cargo run --quiet -- devices --check; then
        install_software_vulkan
        cargo run --quiet -- devices --check
    fi
fi

failed=0
cargo test --no-fail-fast "$@" || failed=$?
# Ignored by default, since few GPUs have one.
if [ $# -eq 0 ] && cargo run --quiet -- devices | grep -q "matrix unit  *yes"; then
    cargo test --no-fail-fast --test gpu_operations --test self_test --test tune \
        matrix_unit -- --ignored || failed=$?
fi
exit "$failed"
