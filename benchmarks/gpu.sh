#!/usr/bin/env bash
set -uo pipefail

readonly GRACE=4 # seconds between the request to end and the end of a part
readonly PARTS="tests data training inference utilisation profile loss run compiled"

usage() {
    cat <<'END'
Everything that wants a GPU, within 8 minutes, into one folder:

  benchmarks/gpu.sh --out FOLDER                              # on a GPU, in bfloat16
  benchmarks/gpu.sh --out FOLDER --device cpu --sizes tiny    # a rehearsal of a few minutes, in float32

  --out FOLDER     new or empty
  --device NAME    cuda (the default) or cpu
  --sizes NAME     full (the default) or tiny
  --parts A,B,...  some of: tests data training inference utilisation profile loss run compiled
  --help           this text

tests: every test marked cuda. training: mosaics bench, a step at 4k, 8k and 32k tokens. inference: the same, prefill and
decoding at 4k, 32k and 128k. utilisation: MFU of a training step of a 302 M model. profile: where the time of a step
goes. loss: Memory Mosaics v2 and a Llama trained on the same rows. run: mosaics train. compiled: mosaics bench --compile
at 4k tokens. data prepares text for loss and run.

Each part has a share of the time, and what the parts before it left. summary.md says of each whether it is done, failed
or out of time, and ends with all tables; PART.txt and PART.log are what it printed, PART.json every sample.
PYTHON names the Python to use: by default .venv/bin/python, else python3. Exit code 1: a part is not done.
END
}

refuse() {
    echo "benchmarks/gpu.sh: $1" >&2
    exit 2
}

out="" device=cuda sizes=full parts=${PARTS// /,}
while (($#)); do
    case $1 in
        --help | -h) usage && exit 0 ;;
        --out | --device | --sizes | --parts)
            (($# > 1)) || refuse "$1 has no value; see --help"
            declare "${1#--}=$2"
            shift 2
            ;;
        *) refuse "there is no option $1; see --help" ;;
    esac
done
[[ $device == cuda || $device == cpu ]] || refuse "--device is $device; give cuda or cpu"
[[ $sizes == full || $sizes == tiny ]] || refuse "--sizes is $sizes; give full or tiny"
for name in ${parts//,/ }; do
    [[ " $PARTS " == *" $name "* ]] || refuse "--parts has $name; choose some of ${PARTS// /, }"
done
[[ -n $out ]] || refuse "name a folder for what is found: --out FOLDER"
mkdir -p "$out" 2>/dev/null && [[ -w $out ]] || refuse "--out is $out, which can't be written to; name another folder"
[[ -z $(ls -A "$out") ]] || refuse "--out is $out, which is not empty; name a new folder"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

python=${PYTHON:-.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
scratch=$(mktemp -d) job=""
trap 'rm -rf "$scratch"' EXIT
trap '[[ -z $job ]] || { kill "$job" && wait "$job"; } 2>/dev/null; exit 130' INT TERM

if [[ $sizes == full ]]; then
    dtype=bfloat16
    paper="window=256 delay=64 train_delay=[64,256]"
    model="vocab_size=32768 hidden_size=1024 num_hidden_layers=6 num_attention_heads=16 intermediate_size=2816 $paper"
    learner="hidden_size=512 num_hidden_layers=8 num_attention_heads=8 intermediate_size=1408 $paper"
    large=""
    training=4096,8192,32768 inference=4096,32768,131072 profile=4096 compiled=4096
    compiled_parts=training,prefill,decoding
    rounds=5 memory=--memory batch=4 context=2048 rows=16 steps=150 corpus=python-stdlib
    declare -A share=([tests]=90 [data]=30 [training]=60 [inference]=80 [utilisation]=45 [profile]=40
        [loss]=50 [run]=25 [compiled]=45)
else
    dtype=float32
    model="vocab_size=300 hidden_size=32 num_hidden_layers=1 num_attention_heads=2 intermediate_size=64 window=16
        delay=4 train_delay=[4,8]"
    learner=$model large=$model
    learner=${learner/vocab_size=300/}
    training=64,128 inference=64,128 profile=64 compiled=64
    compiled_parts=prefill # a compiler for C++ takes minutes for a training step
    rounds=2 memory=--no-memory batch=2 context=64 rows=4 steps=10 corpus=python-reference
    declare -A share=([tests]=30 [data]=15 [training]=25 [inference]=30 [utilisation]=25 [profile]=22 [loss]=20
        [run]=22 [compiled]=36)
fi
[[ $device == cuda ]] || dtype=float32
options=() # those of the model as mosaics takes them
for word in $model; do options+=("--model.${word%%=*}" "${word#*=}"); done
learner_options=()
for word in $learner; do learner_options+=("--model.${word%%=*}" "${word#*=}"); done

facts=$(
    DEVICE=$device timeout 60 "$python" - 2>&1 <<'END'
import os, platform, sys
from importlib.metadata import PackageNotFoundError, version

def of(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"

import torch  # and not mosaics, which takes several seconds

if os.environ["DEVICE"] == "cuda" and not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device; rehearse with --device cpu --sizes tiny")
names = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "pytest")
packages = ", ".join(f"{name} {of(name)}" for name in names)
print(f"- Python {platform.python_version()}, {packages}; CUDA {torch.version.cuda or 'none'}")
if torch.cuda.is_available():
    found = torch.cuda.get_device_properties(0)
    print(f"- {found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}")
print(f"- {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch")
END
) || refuse "$(tail -n 1 <<<"${facts:-$python does not answer}")"
commit=$(git describe --always --dirty --exclude='*' 2>/dev/null)
processor=$(grep -m 1 'model name' /proc/cpuinfo 2>/dev/null)
driver=$(nvidia-smi --query-gpu=driver_version,power.limit,clocks.max.sm --format=csv,noheader 2>/dev/null | head -n 1)
{
    echo "# benchmarks/gpu.sh --device $device --sizes $sizes"
    echo
    echo "- commit ${commit:-unknown}"
    echo "$facts"
    echo "- ${processor#*: }"
    [[ -z $driver ]] || echo "- driver, power limit, highest clock: $driver"
    echo "- begun at $(date -u '+%Y-%m-%d %H:%M:%S UTC'), $dtype"
    echo
    echo "| part | | seconds | its last line, if it is not done |"
    echo "|---|---|---|---|"
} >"$out/summary.md"

ends=10 missed=0 # what is above takes less than ten seconds, or costs the first part

# part NAME COMMAND...: until its share of the time, and those before it, are over.
part() {
    local name=$1 began=$SECONDS left code=0 state=done last
    shift
    ends=$((ends + share[$name]))
    [[ ",$parts," == *",$name,"* ]] || return 0
    left=$((ends - SECONDS - GRACE))
    ((left > 0)) || left=1
    echo "$name, at most $left s" >&2
    # Interrupted, it still prints what it has; a shell without a terminal makes its children deaf to that.
    timeout --signal=INT --kill-after=$GRACE "$left" env --default-signal=INT "$@" \
        </dev/null >"$out/$name.txt" 2>"$out/$name.log" &
    job=$!
    wait "$job" 2>/dev/null || code=$?
    job=""
    if ((code)); then
        state=failed missed=1
        ((code != 124 && (code != 137 || SECONDS - began < left))) || state="out of time"
    fi
    for file in "$out/$name.txt" "$out/$name.log"; do [[ -s $file ]] || rm -f "$file"; done
    last=""
    [[ $state == done ]] || last=$(grep -shv '^ *$' "$out/$name.txt" "$out/$name.log" | tail -n 1)
    echo "| $name | $state | $((SECONDS - began)) | $(tr '|\r' '  ' <<<"$last" | cut -c1-160) |" >>"$out/summary.md"
}

bench() {
    local name=$1
    shift
    part "$name" "$python" -m mosaics bench "${options[@]}" --device "$device" --dtype "$dtype" --batch-sizes 1 \
        --rounds "$rounds" --results "$out/$name.json" "$@"
}

on=(--device "$device" --dtype "$dtype")
mapfile -t marked < <(grep -rl --include='test_*.py' 'pytest.mark.cuda' tests)
part tests "$python" -m pytest -q -rs -p no:cacheprovider -m cuda "${marked[@]}"
part data "$python" -m mosaics prepare --corpus "$corpus" --vocab-size 2048 --out "$scratch/data"
bench training --parts training --contexts "$training" $memory
bench inference --parts prefill,decoding --contexts "$inference" --no-memory
part utilisation "$python" benchmarks/utilisation.py "${on[@]}" --context "$profile" --batch "$batch" \
    --rounds "$rounds" --set $large
part profile "$python" benchmarks/profile_step.py "${on[@]}" --context "$profile" --set $model
part loss "$python" benchmarks/time_to_loss.py "${on[@]}" --folder "$scratch/data" --steps "$steps" --seeds 0 \
    --learning-rates 2e-3 --context "$context" --batch "$rows" --set $learner
part run "$python" -m mosaics train quickstart --run "$scratch/run" --data.prepared "$scratch/data" \
    "${learner_options[@]}" --training.device "$device" --training.precision "$dtype" \
    --training.context_length "$context" --training.batch_size "$rows" --training.steps "$steps" \
    --training.warmup_steps $((steps / 5)) --training.learning_rate 2e-3 --validation.every "$steps"
cp "$scratch/run/metrics.jsonl" "$out/run-metrics.jsonl" 2>/dev/null
bench compiled --parts "$compiled_parts" --contexts "$compiled" --no-memory --compile

{
    echo
    echo "$SECONDS seconds in all."
    for name in $PARTS; do
        [[ -s $out/$name.txt ]] || continue
        echo
        echo "## $name"
        echo
        tail -n 60 "$out/$name.txt"
    done
} >>"$out/summary.md"
cat "$out/summary.md"
exit "$missed"
