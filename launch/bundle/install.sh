#!/usr/bin/env bash
# Installs the bundle that this file lies in, without internet access; all parts must lie beside it.
#   bash install.sh --venv DIR     into the virtual environment DIR, which is made if it is missing
#   bash install.sh --target DIR   into the plain folder DIR, to be named in PYTHONPATH
# --python PY                names the interpreter (default: python3.12 or whatever the bundle is for)
# --system-site-packages     lets a new environment see the packages that the interpreter has (with make_bundle.py --without)
# --work DIR                 where to unpack (default: beside DIR); --verify only verifies the parts
set -euo pipefail
bundle="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

fail() {
    echo "error: $*" >&2
    exit 1
}

venv="" target="" python="" site=() work="" verify=""
while [ $# -gt 0 ]; do
    case "$1" in
    --venv | --target | --python | --work)
        [ $# -ge 2 ] || fail "$1 wants a value"
        printf -v "${1#--}" %s "$2"
        shift
        ;;
    --system-site-packages) site=(--system-site-packages) ;;
    --verify) verify=yes ;;
    *) fail "unknown option $1; see the head of $bundle/install.sh" ;;
    esac
    shift
done

verify_parts() {
    local sum name broken=()
    [ -f "$bundle/SHA256SUMS" ] || fail "$bundle has no SHA256SUMS: the bundle was not finished, or that file was not carried"
    while read -r sum name; do
        if [ ! -f "$bundle/$name" ]; then
            broken+=("$name is missing")
        elif [ "$(sha256sum <"$bundle/$name")" != "$sum  -" ]; then
            broken+=("$name is corrupt")
        fi
    done <"$bundle/SHA256SUMS"
    [ ${#broken[@]} -eq 0 ] || fail "$(printf '%s; ' "${broken[@]}")carry these again into $bundle"
}

# The interpreter that the bundle is for: of --python, of an environment that exists, or found by its name.
find_python() {
    if [ -z "$python" ] && [ -n "$venv" ] && [ -x "$venv/bin/python" ]; then
        python="$venv/bin/python"
    fi
    local found="${python:-python$PYTHON_VERSION}"
    if [ -z "$python" ] && ! command -v "$found" >/dev/null; then
        found=python3
    fi
    local version
    version="$("$found" -c 'import lzma, sys; print("%d.%d" % sys.version_info[:2])')" || fail "$found does not run, or lacks lzma; name another with --python"
    [ "$version" = "$PYTHON_VERSION" ] || fail "the bundle is for Python $PYTHON_VERSION and $found is $version; name another with --python"
    python="$found"
}

# Tells before the work, not in the middle of it.
check_room() {
    local folder free unpack=$((UNPACKED_BYTES / 1024)) keep=$((INSTALLED_BYTES / 1024)) needed
    for folder in "$work" "$parent"; do
        needed=$unpack
        [ "$folder" = "$work" ] || needed=$keep
        [ "$(mount_of "$work")" != "$(mount_of "$parent")" ] || needed=$((unpack + keep))
        free="$(df -Pk "$folder" | awk 'NR == 2 {print $4}')"
        [ "$free" -ge "$needed" ] || fail "$folder has $((free / 1024)) MiB free and $((needed / 1024)) MiB are needed; name another with" \
            "--venv, --target or --work"
    done
}

mount_of() {
    df -Pk "$1" | awk 'NR == 2 {print $6}'
}

install() {
    local into="$1" name
    # No setting of this machine's pip, be it an index or a constraint.
    for name in $(compgen -e PIP_ || true); do unset "$name"; done
    export PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1
    local pip=("$unpacked"/pip-*.whl) options=(--no-index --no-deps --quiet)
    if [ -n "$venv" ]; then
        # Without pip, as some systems' venv module cannot bring it; the bundle's is installed with the rest.
        [ -x "$venv/bin/python" ] || "$python" -m venv --without-pip "${site[@]}" "$venv" || fail "$python -m venv failed; use --target DIR"
        "$venv/bin/python" "${pip[0]}/pip" install "${options[@]}" "$unpacked"/*.whl
        check="$venv/bin/python"
    else
        "$python" "${pip[0]}/pip" install "${options[@]}" --upgrade --target "$target" "$unpacked"/*.whl
        check="$python"
        export PYTHONPATH="$into${PYTHONPATH:+:$PYTHONPATH}"
    fi
    tar -xf "$unpacked/ptl-rl-source.tar" -C "$into"
}

verify_parts
if [ -n "$verify" ]; then
    echo "all parts are here and whole"
    exit 0
fi
[ -n "$venv$target" ] && [ -z "$venv" -o -z "$target" ] || fail "name where to install: --venv DIR or --target DIR"
# shellcheck disable=SC1091
. "$bundle/bundle.conf"
find_python
into="${venv:-$target}"
parent="$(dirname "$into")"
mkdir -p "$parent" "${work:=$parent}"
check_room
into="$(cd "$parent" && pwd)/$(basename "$into")"
[ -z "$venv" ] || venv="$into"
[ -z "$target" ] || target="$into"
unpacked="$(mktemp -d "$work/ptl-bundle-XXXXXX")"
trap 'rm -rf "$unpacked"' EXIT
echo "unpacking"
cat "$bundle"/part-* | "$python" -c '
import lzma, os, shutil, sys, tarfile
with lzma.open(sys.stdin.buffer) as stream, tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as tar:
    for member in tar:
        if "/" in member.name or not member.isfile():
            sys.exit(f"error: {member.name!r} does not belong into a bundle")
        with open(os.path.join(sys.argv[1], member.name), "wb") as out:
            shutil.copyfileobj(tar.extractfile(member), out, 1 << 20)
' "$unpacked"
echo "installing $((INSTALLED_BYTES / 1048576)) MiB into $into"
install "$into"
(cd / && for name in $IMPORTS ptl_rl; do
    "$check" -W ignore -c "import $name" || exit 1
done) || fail "what was installed cannot be imported; see above"
echo "installed into $into; recipes, launch scripts and tests: $into/ptl-rl"
