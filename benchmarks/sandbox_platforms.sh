#!/bin/bash
# The executor's tests where the sandbox must hold but developers do not sit: in containers, and on aarch64.
#
#   benchmarks/sandbox_platforms.sh docker  [FOLDER]   in Docker's default profile: root, user, no capabilities
#   benchmarks/sandbox_platforms.sh gvisor  [FOLDER]   in gVisor, which has a kernel of its own
#   benchmarks/sandbox_platforms.sh aarch64 [FOLDER]   in an emulated machine with Debian 12's kernel and Python
#
# On Debian or Ubuntu, as root, with docker.io and a running daemon; runsc; or qemu-system-arm, debootstrap and cpio.
# FOLDER (default: a temporary one) keeps what was fetched. IMAGE names a container image with Python 3.11; the tests
# need no network in it. DOCKER is the client to call. Emulation takes some ten minutes; the others one each.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
mode=${1:?docker, gvisor or aarch64}
folder=$(realpath "${2:-$(mktemp -d)}")
pytest="-m pytest -q --color=no -p no:cacheprovider tests/executor"

fetch_tests() {  # of machine $1: this package and what its tests import
    local app=$folder/$1
    mkdir -p "$app/tests"
    [ -d "$app/pytest" ] || python3 -m pip -q install --target "$app" --python-version 3.11 --only-binary=:all: \
        --platform "manylinux2014_$1" --platform "manylinux_2_17_$1" pytest hypothesis pyyaml
    rm -rf "$app/azr_jax" "$app/tests/executor"
    cp -r "$root/azr_jax" "$root/pyproject.toml" "$app/"
    cp -r "$root/tests/executor" "$root/tests/conftest.py" "$app/tests/"
    find "$app" -name __pycache__ -prune -exec rm -r {} +
}

in_docker() {
    fetch_tests x86_64
    local options
    for options in "" "--user 1000:1000" "--cap-drop ALL --read-only --tmpfs /tmp --pids-limit 64 --memory 3g"; do
        echo "== docker run $options"
        # shellcheck disable=SC2086
        ${DOCKER:-docker} run --rm --network none -v "$folder/x86_64:/app:ro" -w /app -e PYTHONDONTWRITEBYTECODE=1 \
            $options "${IMAGE:-python:3.11-slim-bookworm}" python3 $pytest
    done
}

in_gvisor() {
    fetch_tests x86_64
    chmod 755 "$folder"
    runsc --platform="${PLATFORM:-ptrace}" --network=none --ignore-cgroups do \
        sh -c "cd $folder/x86_64 && PYTHONDONTWRITEBYTECODE=1 $(command -v python3.11) $pytest"
}

on_aarch64() {
    fetch_tests aarch64
    local machine=$folder/machine
    if [ ! -d "$machine" ]; then  # nothing is configured: unpacked, Python runs
        debootstrap --arch=arm64 --foreign --variant=minbase \
            --include=python3.11,busybox-static,linux-image-cloud-arm64 bookworm "$machine.part"
        find "$machine.part/var/cache/apt/archives" -name '*.deb' -exec dpkg-deb -x {} "$machine.part" \;
        mv "$machine.part/boot" "$folder/"
        rm -r "$machine.part"/{var/cache/apt,debootstrap,usr/share/doc} "$machine.part"/lib/modules
        mv "$machine.part" "$machine"
    fi
    rm -rf "$machine/app"
    cp -r "$folder/aarch64" "$machine/app"
    printf 'root:x:0:0::/tmp:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n' > "$machine/etc/passwd"
    cat > "$machine/init" <<'END'
#!/bin/busybox sh
export PATH=/usr/bin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mkdir -p /dev/shm
/bin/busybox mount -t tmpfs tmp /tmp
cd /app
/bin/busybox uname -a
python3.11 -c 'from azr_jax.executor import sandbox_layers; print(sandbox_layers())'
END
    echo "python3.11 $pytest
/bin/busybox poweroff -f" >> "$machine/init"
    chmod 755 "$machine/init"
    (cd "$machine" && find . | cpio -o -H newc --quiet) > "$folder/initramfs"
    nice -n 19 qemu-system-aarch64 -M virt -cpu max,pauth-impdef=on -m 3072 -nographic -no-reboot -nic none \
        -kernel "$folder"/boot/vmlinuz-* -initrd "$folder/initramfs" -append "console=ttyAMA0 quiet panic=1" < /dev/null
}

case $mode in
    docker) in_docker ;;
    gvisor) in_gvisor ;;
    aarch64) on_aarch64 ;;
    *) echo "unknown: $mode" >&2; exit 2 ;;
esac
