#!/bin/sh
# Runs the tests of the GPU backend on several drivers, one after the other: lavapipe (Mesa) and
# SwiftShader (Google) for Vulkan, and the machine's OpenGL by the feature `gl`. A Vulkan driver that is
# missing is fetched on Debian, else named as not run: then the exit status is 3 where nothing failed.
#
#   tests/drivers.sh                 # all of them but mesa
#   tests/drivers.sh swiftshader     # one
#   tests/drivers.sh mesa            # a Mesa of 2026, whose llvmpipe has a matrix unit: the tests of that
#                                    # alone; needs root, debootstrap and 0.6 GB
#
# SWIFTSHADER=FILE names the vk_swiftshader_icd.json of an installation, such as Chromium's.
set -eu
cd "$(dirname "$0")/.."

export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/tmp}"

# A test within the folder of another system, where this one lies at the same place. What is mounted is
# seen by this process alone, and gone with it.
case "${1:-}" in
    --within)
        shift
        WITHIN=yes exec unshare --mount "$0" --mounted "$@"
        ;;
    --mounted)
        # By hand it would mount for all.
        [ "${WITHIN:-}" = yes ] || exit 2
        shift
        root="$PWD/target/drivers/mesa"
        mkdir -p "$root$PWD"
        mount --bind "$PWD" "$root$PWD"
        mount --bind /proc "$root/proc"
        mount --bind /dev "$root/dev"
        exec chroot "$root" sh -c 'cd "$0" && exec "$@"' "$PWD" "$@"
        ;;
esac

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

# Debian 14 has it, with a C library newer than ours: a whole system in a folder, of which nothing is
# installed here.
mesa() {
    folder=target/drivers/mesa
    if [ ! -e "$folder/whole" ]; then
        [ "$(id -u)" -eq 0 ] && command -v debootstrap >/dev/null && command -v unshare >/dev/null ||
            return 0
        rm -rf --one-file-system "$folder"
        mkdir -p "$folder"
        debootstrap --variant=minbase --include=mesa-vulkan-drivers,libvulkan1 forky "$folder" \
            http://deb.debian.org/debian /usr/share/debootstrap/scripts/sid >&2 || return 0
        touch "$folder/whole"
    fi
    echo "/usr/share/vulkan/icd.d/lvp_icd.json"
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
        lavapipe | swiftshader | mesa) file="$("$driver")" ;;
        *)
            echo "no driver named $driver: lavapipe, swiftshader, gl or mesa" >&2
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
    if [ "$driver" = mesa ]; then
        host="$(rustc -vV | sed -n 's/^host: //p' | tr a-z- A-Z_)"
        # The rest of the tests are as on any lavapipe.
        env "CARGO_TARGET_${host}_RUNNER=$PWD/tests/drivers.sh --within" \
            cargo test --no-fail-fast --test gpu_operations --test self_test --test tune \
            matrix_unit -- --include-ignored || failed=1
        continue
    fi
    # shellcheck disable=SC2086
    cargo test --no-fail-fast $tests || failed=1
done
[ "$failed" -eq 0 ] || exit "$failed"
exit "$missing"
