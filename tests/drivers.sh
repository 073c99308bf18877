#!/bin/sh
# Runs the tests of the GPU backend on several drivers, one after the other: lavapipe (Mesa) and
# SwiftShader (Google) for Vulkan, and the machine's OpenGL by the feature `gl`. A Vulkan driver that is missing is fetched on Debian, else named as not run: then
# the exit status is 3 where nothing failed.
#
#   tests/drivers.sh                 # all of them
#   tests/drivers.sh swiftshader     # one
#
# SWIFTSHADER=FILE names the vk_swiftshader_icd.json of an installation, such as Chromium's.
set -eu
cd "$(dirname "$0")/.."

export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/tmp}"

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

lavapipe() {
    for folder in /usr/share/vulkan/icd.d /usr/local/share/vulkan/icd.d; do
        for file in "$folder"/lvp_icd*.json; do
            if [ -e "$file" ]; then
                echo "$file"
                return
            fi
        done
    done
}

# Of Debian's chromium-common (31 MB) two files are enough; nothing is installed.
swiftshader() {
    for file in "${SWIFTSHADER:-}" target/drivers/usr/lib/chromium/vk_swiftshader_icd.json \
        /usr/lib/chromium/vk_swiftshader_icd.json /opt/google/chrome/vk_swiftshader_icd.json; do
        if [ -n "$file" ] && [ -e "$file" ]; then
            echo "$file"
            return
        fi
    done
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 0
    mkdir -p target/drivers
    (
        cd target/drivers
        apt-get download chromium-common >&2 ||
            { as_root apt-get update >&2 && apt-get download chromium-common >&2; } || exit 0
        dpkg-deb --fsys-tarfile chromium-common_*.deb |
            tar -x ./usr/lib/chromium/libvk_swiftshader.so ./usr/lib/chromium/vk_swiftshader_icd.json
        rm chromium-common_*.deb
        echo "target/drivers/usr/lib/chromium/vk_swiftshader_icd.json"
    )
}

failed=0
missing=0
tests="--test gpu_operations --test gpu --test gpu_cache --test self_test --test bisect"
for driver in ${*:-lavapipe swiftshader gl}; do
    case "$driver" in
        gl)
            echo "== OpenGL, with no Vulkan driver in sight" >&2
            # shellcheck disable=SC2086
            VK_DRIVER_FILES=/dev/null VK_ICD_FILENAMES=/dev/null \
                cargo test --no-fail-fast --features gl $tests || failed=1
            continue
            ;;
        lavapipe | swiftshader) file="$("$driver")" ;;
        *)
            echo "no driver named $driver: lavapipe, swiftshader or gl" >&2
            exit 2
            ;;
    esac
    if [ -z "$file" ]; then
        echo "== $driver: NOT RUN: it is not here" >&2
        missing=3
        continue
    fi
    case "$file" in
        /*) ;;
        *) file="$PWD/$file" ;;
    esac
    echo "== $driver: $file" >&2
    # Older loaders know the second name only.
    export VK_DRIVER_FILES="$file" VK_ICD_FILENAMES="$file"
    # shellcheck disable=SC2086
    cargo test --no-fail-fast $tests || failed=1
done
[ "$failed" -eq 0 ] || exit "$failed"
exit "$missing"
