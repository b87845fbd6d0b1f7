#!/usr/bin/env bash
# The GPU suite, in the root of a checkout where .ci/gpu/collect has filled .whl/ and .gpu/:
#
#   OUT=DIR bash .gpu/run.sh              # 540 s
#   OUT=DIR BUDGET=200 bash .gpu/run.sh   # goes on with what is left, on the same machine
#   OUT=DIR STAGES="install train_deep" bash .gpu/run.sh   # a second call: trains reader-deep
#
# Stages run in the order of their value, each under a limit; one that fails does not stop the next.
# What is finished is not run again in a later call on the same machine: rows that exist, stages that
# ended. The files in $OUT are written as results come, so that a call that is cut off leaves what it had.
#
# BUDGET   seconds of this call, installation included (540)
# STAGES   which of them (train_emoji and train_deep only where they are named); FORCE=1 also those that ended
# SLOW     factor of the stages' limits, for a busy machine (1)
# WORK     where packages, caches and state go (/tmp/compress-gpu)
# DEVICE, TINY=1   cpu and tiny sizes: a rehearsal without a GPU
set -uo pipefail
BUDGET=${BUDGET:-540}
SLOW=${SLOW:-1}
STAGES=${STAGES:-install env tests kernels fastocr profile tune rtprune gradflow bf16 fp32 reader more compiled sanitizer}
root=$PWD
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${WORK:-/tmp/compress-gpu}
python=${PYTHON:-python3}
export OUT=${OUT:-$work/out} GPU_WORK=$work GPU_DEVICE=${DEVICE:-cuda} GPU_TINY=${TINY:-0}
export GPU_END=$(($(date +%s) + BUDGET - SECONDS))
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 PYTHONPATH=$work/site PYTHONPYCACHEPREFIX=$work/pyc PYTHONDONTWRITEBYTECODE=
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HOME=$work/hf MPLBACKEND=Agg
export COMPRESS_CACHE=$work/cache COMPRESS_DEBUG=1 TRITON_CACHE_DIR=$work/triton
[ -d compress ] && [ -d kernels ] || { echo "error: start it in the root of the checkout" >&2; exit 2; }
mkdir -p "$OUT" "$work/state" "$work/run"
log=$OUT/log.txt
# rows of an earlier call on this machine, whose $OUT was emptied since
for file in {rows,stages,profiles,runs}.jsonl; do
    [ -e "$OUT/$file" ] || cp "$work/state/$file" "$OUT/$file" 2>/dev/null || : >"$OUT/$file"
done

# stage NAME SECONDS COMMAND...: under a limit, into the log, with a line about how it went
stage() {
    local name=$1 limit=$(($2 * SLOW)) begin=$SECONDS rc=0 room=$((GPU_END - $(date +%s) - 6))
    shift 2
    [[ " $STAGES " == *" $name "* ]] || return 0
    [ -e "$work/state/$name.done" ] && [ -z "${FORCE:-}" ] && return 0
    [ "$limit" -le "$room" ] || limit=$room
    if [ "$limit" -lt 10 ]; then
        echo "{\"stage\": \"$name\", \"rc\": null, \"skipped\": \"no time left\"}" | tee -a "$OUT/stages.jsonl"
        return 0
    fi
    printf '\n==== %s (at most %s s)\n' "$name" "$limit" >>"$log"
    (cd "$work/run" && GPU_STAGE_END=$(($(date +%s) + limit - 3)) timeout -k 5 "$limit" "$@") >>"$log" 2>&1 </dev/null || rc=$?
    echo "{\"stage\": \"$name\", \"rc\": $rc, \"seconds\": $((SECONDS - begin)), \"limit\": $limit}" | tee -a "$OUT/stages.jsonl"
    # 124 and 137 were cut off: a later call goes on with them
    case $rc in 124 | 137) ;; *) touch "$work/state/$name.done" ;; esac
    cp "$OUT/rows.jsonl" "$OUT/stages.jsonl" "$work/state/"
}

# The wheels, then the checkout as the package that pyproject.toml describes: kernels/, eval/ and
# recipes/ lie inside compress/. Copied, not built: that needs no build tools.
install() {
    set -e
    rm -rf "$work/site"
    mkdir -p "$work/site"
    if compgen -G "$root/.whl/*.whl" >/dev/null; then
        "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile \
            --no-cache-dir --upgrade --target "$work/site" "$root"/.whl/*.whl
    fi
    cp -r "$root/compress" "$work/site/compress"
    cp -r "$root/eval" "$root/kernels" "$root/recipes" "$work/site/compress/"
    "$python" - "$root/pyproject.toml" "$work/site" <<'PYTHON'
import sys, tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
info = Path(sys.argv[2]) / f"compress_models-{project['version']}.dist-info"
info.mkdir()
lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
lines += [f"Requires-Dist: {text}" for text in project["dependencies"]]
for extra in ("ocr", "report"):
    lines += [f'Requires-Dist: {text}; extra == "{extra}"' for text in project["optional-dependencies"][extra]]
(info / "METADATA").write_text("\n".join(lines) + "\n")
(info / "RECORD").write_text("")
PYTHON
    "$python" -m compileall -q -j 0 "$work/site/transformers/models/auto" "$work/site/compress" || true
}

# failures are printed as they come: a stage that is cut off has said what it found
tests() {
    local files marks=gpu pick=() workers=8
    cd "$root"
    export OMP_NUM_THREADS=2 PYTHONPATH=$PYTHONPATH:$here
    mapfile -t files < <(grep -rl 'pytest\.mark\.gpu' tests --include='test_*.py' | sort)
    if [ "$GPU_DEVICE" = cpu ]; then
        marks='not gpu and not slow' workers=2 pick=(-k 'reference_is_pot or merging_adds')
    fi
    # pyproject.toml makes warnings errors, and another torch has other warnings
    "$python" -m pytest -m "$marks" "${pick[@]}" -n "$workers" -W default -p no:cacheprovider -p failures -q \
        --continue-on-collection-errors --durations=10 --junitxml="$OUT/tests.xml" "${files[@]}"
}

# an error that leaves CUDA unusable costs one shape: the next process begins with the one after it
bench() {
    local try
    for try in 1 2 3 4; do
        "$python" "$here/bench.py" "$@" && return 0
        [ "$(date +%s)" -lt "$((GPU_STAGE_END - 15))" ] || return 1
    done
    return 1
}

compressed() { # NAME OVERRIDES...
    local name=$1 begin=$SECONDS rc=0 tiny=()
    shift
    [ "$GPU_TINY" = 0 ] || tiny=(--set method.steps=12 --set method.update_every=2 --set method.max_move=1.0 --set recover.steps=4 --set evaluate.samples=32 --set evaluate.steps=2)
    "$python" -m compress.cli run ddpm_gradflow --device "$GPU_DEVICE" --overwrite --output "$work/run/$name" "$@" "${tiny[@]}" || rc=$?
    "$python" "$here/extra.py" metrics "$name" "$work/run/$name" "$((SECONDS - begin))" "$rc"
    return $rc
}

# what is published so far comes back also when the stage is cut off; a later call resumes it
train_emoji() {
    local run=$work/run/emoji resume=() rc=0
    mkdir -p "$COMPRESS_CACHE"
    cp "$here/emoji.safetensors" "$COMPRESS_CACHE/"
    [ ! -d "$run" ] || resume=(--resume)
    timeout "$((GPU_STAGE_END - $(date +%s) - 15))" "$python" -m compress.models.builtin.train_ddpm_emoji --run "$run" "${resume[@]}" --device "$GPU_DEVICE" \
        --batch 256 --lr 4e-4 --every 30 --seconds "$((GPU_STAGE_END - $(date +%s) - 60))" || rc=$?
    tar -C "$run" -czf "$OUT/ddpm_emoji.tgz" model log.jsonl samples.png || rc=$?
    return $rc
}

train_deep() {
    local run=$work/run/reader-deep rc=0 options=()
    [ ! -e "$run" ] || options=(--resume)
    [ "$GPU_TINY" = 0 ] || options+=(--small --final 1)
    [ "$GPU_DEVICE" = cpu ] || options+=(--bf16 --workers 14)
    timeout "$((GPU_STAGE_END - $(date +%s) - 15))" "$python" "$work/site/compress/models/builtin/train_reader_deep.py" \
        --run "$run" --warm-start --device "$GPU_DEVICE" "${options[@]}" || rc=$?
    cp -r "$run/log.jsonl" "$run/model" "$OUT/"
    return $rc
}
export -f install tests bench compressed train_emoji train_deep
export root here work python

stage install 90 bash -c install
stage env 90 bash -c '"$python" "$here/extra.py" env; "$python" -m compress.cli doctor'
stage tests 150 bash -c tests
stage kernels 70 bash -c 'bench kernels'
stage fastocr 130 bash -c 'bench fastocr'
stage profile 90 "$python" "$here/extra.py" profile
stage tune 60 "$python" "$here/extra.py" tune
stage rtprune 80 bash -c 'bench rtprune'
stage gradflow 80 bash -c 'bench gradflow'
stage bf16 120 bash -c 'compressed ddpm_gradflow_bf16 --set train.mixed_precision=bf16'
stage fp32 120 bash -c 'compressed ddpm_gradflow_float32'
stage reader 120 "$python" "$here/extra.py" reader
stage train_emoji 450 bash -c train_emoji
stage more 300 bash -c 'bench more'
stage train_deep 500 bash -c train_deep
if [ "$GPU_DEVICE" = cuda ]; then
    stage compiled 120 "$python" "$here/extra.py" compiled
    stage sanitizer 90 compute-sanitizer --tool memcheck --print-limit 20 "$python" "$here/extra.py" touch
fi
"$python" "$here/extra.py" summary 2>>"$log" | tee "$OUT/summary.txt"
